// etcd_load puts a load on etcd through its v3 API and tells what came of it as one line of JSON: the counterpart of benchmarks/_raft_load.py.
//
//	etcd_load ENDPOINT,ENDPOINT,... write|read|pulse N_AT_ONCE SECONDS
//
// write and read: that many at once, over and over, after a warm-up. pulse: one write after the other, each tried until it is answered; tells
// the longest silence between two answers.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	valueBytes = 256
	keys       = 10007
	warmUp     = 500 * time.Millisecond
	timeout    = 5 * time.Second
	// A write of `pulse` that is not answered so soon is given up and made again, as a client that cares would.
	pulseTimeout = 100 * time.Millisecond
)

type outcome struct {
	N       int     `json:"n"`
	Seconds float64 `json:"seconds"`
	P50Ms   float64 `json:"p50_ms"`
	P99Ms   float64 `json:"p99_ms"`
	CPUs    float64 `json:"client_s"`
	GapMs   float64 `json:"gap_ms"`
}

func main() {
	n, err := strconv.Atoi(os.Args[3])
	check(err)
	seconds, err := strconv.ParseFloat(os.Args[4], 64)
	check(err)
	client, err := clientv3.New(clientv3.Config{Endpoints: strings.Split(os.Args[1], ","), DialTimeout: timeout})
	check(err)
	defer client.Close()
	span := time.Duration(seconds * float64(time.Second))
	var found outcome
	if os.Args[2] == "pulse" {
		found = pulse(client, span)
	} else {
		run(client, os.Args[2], n, warmUp)
		found = run(client, os.Args[2], n, span)
	}
	check(json.NewEncoder(os.Stdout).Encode(found))
}

func run(client *clientv3.Client, what string, n int, span time.Duration) outcome {
	value := strings.Repeat("v", valueBytes)
	took := make([][]time.Duration, n)
	began, cpu := time.Now(), cpuSeconds()
	until := began.Add(span)
	var group sync.WaitGroup
	for worker := range n {
		group.Add(1)
		go func() {
			defer group.Done()
			number := worker
			for time.Now().Before(until) {
				number = (number*1103515245 + 12345) % keys
				key := fmt.Sprintf("key%06d", number)
				start := time.Now()
				ctx, cancel := context.WithTimeout(context.Background(), timeout)
				var err error
				if what == "write" {
					_, err = client.Put(ctx, key, value)
				} else {
					_, err = client.Get(ctx, key)
				}
				cancel()
				check(err)
				took[worker] = append(took[worker], time.Since(start))
			}
		}()
	}
	group.Wait()
	found := outcome{Seconds: time.Since(began).Seconds(), CPUs: cpuSeconds() - cpu}
	var all []time.Duration
	for _, each := range took {
		all = append(all, each...)
	}
	sort.Slice(all, func(a, b int) bool { return all[a] < all[b] })
	found.N = len(all)
	if found.N > 0 {
		found.P50Ms = all[found.N/2].Seconds() * 1000
		found.P99Ms = all[found.N*99/100].Seconds() * 1000
	}
	return found
}

func pulse(client *clientv3.Client, span time.Duration) outcome {
	value := strings.Repeat("v", valueBytes)
	for try(client, value) != nil {
		continue
	}
	fmt.Println("ready")
	began := time.Now()
	last := began
	var found outcome
	for time.Since(began) < span {
		if try(client, value) != nil {
			continue
		}
		now := time.Now()
		if gap := now.Sub(last).Seconds() * 1000; gap > found.GapMs {
			found.GapMs = gap
		}
		last = now
		found.N++
	}
	found.Seconds = time.Since(began).Seconds()
	if gap := time.Since(last).Seconds() * 1000; gap > found.GapMs {
		found.GapMs = gap
	}
	return found
}

func try(client *clientv3.Client, value string) error {
	ctx, cancel := context.WithTimeout(context.Background(), pulseTimeout)
	defer cancel()
	_, err := client.Put(ctx, "pulse", value)
	return err
}

func cpuSeconds() float64 {
	var usage syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
