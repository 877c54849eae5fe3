// pulse_reader reads an exposition over HTTP as fast as it comes and tells, as one line of JSON, how long that took: so that what is measured is
// who serves. It does not unpack and does not parse; it counts bytes up to the end of the body.
//
//	pulse_reader ADDRESS PATH CODING N [PAUSE_MS]
//
// N requests one after the other, each on a connection of its own, PAUSE_MS apart. CODING is what Accept-Encoding says.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

const (
	timeout     = 120 * time.Second
	bufferBytes = 1 << 20
	// Left to itself the kernel makes the window larger than the buffer holds while the reader waits for its CPU, drops what is over, and the
	// sender's pauses before it sends again would be what is measured.
	receiveBytes = 4 << 20
)

type outcome struct {
	FirstMs []float64 `json:"first_ms"`
	LastMs  []float64 `json:"last_ms"`
	Bytes   int64     `json:"bytes"`
	Coding  string    `json:"coding"`
	Type    string    `json:"type"`
}

func main() {
	address, path, coding := os.Args[1], os.Args[2], os.Args[3]
	n, err := strconv.Atoi(os.Args[4])
	check(err)
	pause := 0
	if len(os.Args) > 5 {
		pause, err = strconv.Atoi(os.Args[5])
		check(err)
	}
	var found outcome
	buffer := make([]byte, bufferBytes)
	for i := 0; i < n; i++ {
		if i > 0 {
			time.Sleep(time.Duration(pause) * time.Millisecond)
		}
		check(scrape(address, path, coding, buffer, &found))
	}
	check(json.NewEncoder(os.Stdout).Encode(found))
}

func scrape(address, path, coding string, buffer []byte, found *outcome) error {
	connection, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer connection.Close()
	if err := connection.(*net.TCPConn).SetReadBuffer(receiveBytes); err != nil {
		return err
	}
	if err := connection.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	began := time.Now()
	request := "GET " + path + " HTTP/1.1\r\nHost: " + address + "\r\nAccept-Encoding: " + coding + "\r\nConnection: close\r\n\r\n"
	if _, err := io.WriteString(connection, request); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReaderSize(connection, bufferBytes), nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", response.Status)
	}
	var count int64
	for {
		n, err := response.Body.Read(buffer)
		if count == 0 && n > 0 {
			found.FirstMs = append(found.FirstMs, since(began))
		}
		count += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	found.LastMs = append(found.LastMs, since(began))
	found.Bytes = count
	found.Coding = response.Header.Get("Content-Encoding")
	found.Type = response.Header.Get("Content-Type")
	return nil
}

func since(began time.Time) float64 {
	return float64(time.Since(began).Microseconds()) / 1000
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
