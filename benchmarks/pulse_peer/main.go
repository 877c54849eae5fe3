// pulse_peer serves the figures of all sandboxes the way kata-monitor does, with Prometheus' own libraries: what isopod's agent is measured
// beside where kata-monitor itself cannot be built.
//
//	pulse_peer ADDRESS FOLDER
//
// At each GET /metrics it asks every shim below FOLDER at once over its Unix socket (3 s at most), parses what they say with expfmt, gives
// each sample four labels, puts the families together by name, and encodes them, packed with gzip if the client takes that. Query parameters:
// sandbox=ID passes one shim's text on as it is, filter_family=a,b keeps families by prefix. Names of pods are made up from the ids.
package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

const (
	socketName  = "shim-monitor.sock"
	shimTimeout = 3 * time.Second
)

var renames = []struct{ from, to string }{{"go_", "kata_shim_go_"}, {"process_", "kata_shim_process_"}}

var packers = sync.Pool{New: func() any { return gzip.NewWriter(nil) }}

type agent struct{ folder string }

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: pulse_peer ADDRESS FOLDER")
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/metrics", (&agent{os.Args[2]}).metrics)
	log.Fatal(http.ListenAndServe(os.Args[1], mux))
}

func (a *agent) metrics(writer http.ResponseWriter, request *http.Request) {
	if id := request.URL.Query().Get("sandbox"); id != "" {
		body, err := a.ask(id)
		if err != nil {
			http.Error(writer, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = writer.Write(body)
		return
	}
	format := expfmt.Negotiate(request.Header)
	writer.Header().Set("Content-Type", string(format))
	var out io.Writer = writer
	if strings.Contains(request.Header.Get("Accept-Encoding"), "gzip") {
		writer.Header().Set("Content-Encoding", "gzip")
		packer := packers.Get().(*gzip.Writer)
		packer.Reset(writer)
		defer func() { _ = packer.Close(); packers.Put(packer) }()
		out = packer
	}
	encoder := expfmt.NewEncoder(out, format)
	for _, family := range a.collect(request.URL.Query().Get("filter_family")) {
		if err := encoder.Encode(family); err != nil {
			log.Print(err)
			return
		}
	}
}

func (a *agent) collect(prefixes string) []*dto.MetricFamily {
	entries, err := os.ReadDir(a.folder)
	if err != nil {
		log.Print(err)
		return nil
	}
	answers := make(chan map[string]*dto.MetricFamily, len(entries))
	var waiting sync.WaitGroup
	for _, entry := range entries {
		waiting.Add(1)
		go func(id string) {
			defer waiting.Done()
			families, err := a.read(id)
			if err != nil {
				log.Print(id, ": ", err)
				return
			}
			answers <- families
		}(entry.Name())
	}
	waiting.Wait()
	close(answers)
	merged := map[string]*dto.MetricFamily{}
	for families := range answers {
		for name, family := range families {
			if !wanted(name, prefixes) {
				continue
			}
			if known := merged[name]; known != nil {
				known.Metric = append(known.Metric, family.Metric...)
			} else {
				merged[name] = family
			}
		}
	}
	sorted := make([]*dto.MetricFamily, 0, len(merged))
	for _, family := range merged {
		sorted = append(sorted, family)
	}
	sort.Slice(sorted, func(i, j int) bool { return sorted[i].GetName() < sorted[j].GetName() })
	return sorted
}

func (a *agent) read(id string) (map[string]*dto.MetricFamily, error) {
	body, err := a.ask(id)
	if err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	added := []*dto.LabelPair{pair("sandbox_id", id), pair("cri_uid", id[:32]), pair("cri_name", "app-"+id[:8]), pair("cri_namespace", "team-"+id[:2])}
	renamed := make(map[string]*dto.MetricFamily, len(families))
	for name, family := range families {
		for _, rename := range renames {
			if rest, found := strings.CutPrefix(name, rename.from); found {
				name = rename.to + rest
				family.Name = &name
			}
		}
		for _, metric := range family.Metric {
			metric.Label = append(metric.Label, added...)
		}
		renamed[name] = family
	}
	return renamed, nil
}

func (a *agent) ask(id string) ([]byte, error) {
	if filepath.Base(id) != id {
		return nil, errors.New("no such sandbox")
	}
	path := filepath.Join(a.folder, id, socketName)
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}
	client := http.Client{Timeout: shimTimeout, Transport: transport}
	response, err := client.Get("http://shim/metrics")
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %s", response.Status)
	}
	return io.ReadAll(response.Body)
}

func pair(name, value string) *dto.LabelPair { return &dto.LabelPair{Name: &name, Value: &value} }

func wanted(name, prefixes string) bool {
	if prefixes == "" {
		return true
	}
	for _, prefix := range strings.Split(prefixes, ",") {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}
