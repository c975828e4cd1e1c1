// A peer of the matrix over Go's crypto/tls. Tasks are lines of JSON on standard input, answers are
// lines of JSON on standard output; ../__init__.py says what they say.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
)

type named struct {
	Name  string `json:"name"`
	Chain string `json:"chain"`
	Key   string `json:"key"`
}

type task struct {
	ID          int      `json:"id"`
	Role        string   `json:"role"`
	Port        int      `json:"port"`
	Connections int      `json:"connections"`
	Groups      []string `json:"groups"`
	Own         *named   `json:"own"`
	CA          string   `json:"ca"`
	Other       *named   `json:"other"`
	ServerName  string   `json:"server_name"`
	ALPN        []string `json:"alpn"`
	Size        int      `json:"size"`
	First       string   `json:"first"`
	HalfClose   bool     `json:"half_close"`
	Exporter    string   `json:"exporter"`
}

type report struct {
	Group      string   `json:"group"`
	Suite      string   `json:"suite"`
	ALPN       string   `json:"alpn"`
	Resumed    bool     `json:"resumed"`
	ServerName string   `json:"server_name"`
	Peer       *string  `json:"peer"`
	Exporter   string   `json:"exporter"`
	KeyLog     []string `json:"key_log"`
	Received   string   `json:"received"`
}

type answer struct {
	ID        int      `json:"id"`
	Version   string   `json:"version,omitempty"`
	Listening int      `json:"listening,omitempty"`
	Reports   []report `json:"reports,omitempty"`
	Error     string   `json:"error,omitempty"`
}

var (
	writing sync.Mutex
	groups  = map[string]tls.CurveID{
		"x25519": tls.X25519, "secp256r1": tls.CurveP256, "secp384r1": tls.CurveP384,
		"X25519MLKEM768": tls.X25519MLKEM768, "SecP256r1MLKEM768": tls.SecP256r1MLKEM768,
		"SecP384r1MLKEM1024": tls.SecP384r1MLKEM1024, "MLKEM1024": tls.MLKEM1024,
	}
)

func say(a answer) {
	writing.Lock()
	defer writing.Unlock()
	line, _ := json.Marshal(a)
	fmt.Println(string(line))
}

// keyLog keeps the lines of one connection.
type keyLog struct {
	lock  sync.Mutex
	lines []string
}

func (k *keyLog) Write(data []byte) (int, error) {
	k.lock.Lock()
	defer k.lock.Unlock()
	k.lines = append(k.lines, strings.TrimSpace(string(data)))
	return len(data), nil
}

func configure(t *task) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: t.ALPN, ServerName: t.ServerName}
	for _, name := range t.Groups {
		config.CurvePreferences = append(config.CurvePreferences, groups[name])
	}
	if t.Own != nil {
		own, err := tls.LoadX509KeyPair(t.Own.Chain, t.Own.Key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{own}
	}
	if t.Other != nil {
		// Of several certificates, crypto/tls takes the first that fits the client's server name.
		other, err := tls.LoadX509KeyPair(t.Other.Chain, t.Other.Key)
		if err != nil {
			return nil, err
		}
		config.Certificates = append(config.Certificates, other)
	}
	if t.CA != "" {
		pem, err := os.ReadFile(t.CA)
		if err != nil {
			return nil, err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, errors.New("no certificate in " + t.CA)
		}
		config.RootCAs, config.ClientCAs = pool, pool
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	if t.Connections > 1 {
		config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	}
	return config, nil
}

func speak(conn *tls.Conn, t *task) error {
	data := []byte{}
	for number := 0; len(data) < t.Size; number++ {
		data = append(data, fmt.Sprintf("%s %08d\n", t.Role, number)...)
	}
	if _, err := conn.Write(data[:t.Size]); err != nil {
		return err
	}
	if t.HalfClose && t.First == t.Role {
		return conn.CloseWrite()
	}
	return nil
}

func listen(conn *tls.Conn, t *task) (string, error) {
	digest := sha256.New()
	_, err := io.CopyN(digest, conn, int64(t.Size))
	if err == nil && t.HalfClose && t.First != t.Role {
		err = untilEnd(conn)
	}
	return hex.EncodeToString(digest.Sum(nil)), err
}

func untilEnd(conn *tls.Conn) error {
	more, err := io.Copy(io.Discard, conn)
	if err == nil && more > 0 {
		err = fmt.Errorf("%d bytes too many", more)
	}
	return err
}

func talk(conn *tls.Conn, t *task, log *keyLog) (report, error) {
	defer conn.Close()
	if err := conn.HandshakeContext(context.Background()); err != nil {
		return report{}, err
	}
	received, err := "", error(nil)
	switch t.First {
	case "":
		spoken := make(chan error, 1)
		go func() { spoken <- speak(conn, t) }()
		received, err = listen(conn, t)
		err = errors.Join(err, <-spoken)
	case t.Role:
		if err = speak(conn, t); err == nil {
			received, err = listen(conn, t)
		}
	default:
		if received, err = listen(conn, t); err == nil {
			err = speak(conn, t)
		}
	}
	if err != nil {
		return report{}, err
	}
	state := conn.ConnectionState()
	secret, err := state.ExportKeyingMaterial(t.Exporter, nil, 32)
	if err != nil {
		return report{}, err
	}
	if err := errors.Join(conn.CloseWrite(), untilEnd(conn)); err != nil {
		return report{}, err
	}
	told := report{
		Group: state.CurveID.String(), Suite: tls.CipherSuiteName(state.CipherSuite),
		ALPN: state.NegotiatedProtocol, Resumed: state.DidResume, ServerName: state.ServerName,
		Exporter: hex.EncodeToString(secret), KeyLog: log.lines, Received: received,
	}
	for name, code := range groups {
		if code == state.CurveID {
			told.Group = name
		}
	}
	if len(state.PeerCertificates) > 0 {
		digest := sha256.Sum256(state.PeerCertificates[0].Raw)
		text := hex.EncodeToString(digest[:])
		told.Peer = &text
	}
	return told, nil
}

func run(t *task) ([]report, error) {
	config, err := configure(t)
	if err != nil {
		return nil, err
	}
	var next func() (net.Conn, error)
	wrap := tls.Client
	address := fmt.Sprintf("127.0.0.1:%d", t.Port)
	if t.Role == "server" {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return nil, err
		}
		defer listener.Close()
		say(answer{ID: t.ID, Listening: listener.Addr().(*net.TCPAddr).Port})
		next, wrap = listener.Accept, tls.Server
	} else {
		next = func() (net.Conn, error) { return net.Dial("tcp", address) }
	}
	reports := []report{}
	// Session tickets are sealed under keys that the original Config keeps.
	log := &keyLog{}
	config.KeyLogWriter = log
	for range t.Connections {
		conn, err := next()
		if err != nil {
			return nil, err
		}
		log.lines = nil
		told, err := talk(wrap(conn, config), t, log)
		if err != nil {
			return nil, err
		}
		reports = append(reports, told)
	}
	return reports, nil
}

func main() {
	say(answer{Version: strings.TrimPrefix(runtime.Version(), "go")})
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		t := &task{}
		if err := json.Unmarshal(lines.Bytes(), t); err != nil {
			panic(err)
		}
		go func() {
			reports, err := run(t)
			if err != nil {
				say(answer{ID: t.ID, Error: err.Error()})
				return
			}
			say(answer{ID: t.ID, Reports: reports})
		}()
	}
}
