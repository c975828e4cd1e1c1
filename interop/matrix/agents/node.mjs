// Node's tls module (OpenSSL), as a peer of the matrix; __init__.py says how agents talk.
import crypto from 'node:crypto';
import fs from 'node:fs';
import readline from 'node:readline';
import tls from 'node:tls';

const say = (answer) => console.log(JSON.stringify(answer));

function options(task) {
  // OpenSSL counts an external PSK as a session, so that is not told below.
  const made = {
    minVersion: 'TLSv1.3', allowHalfOpen: true, ALPNProtocols: task.alpn.length ? task.alpn : undefined,
  };
  if (task.groups.length) made.ecdhCurve = task.groups.join(':');
  if (task.suites.length) made.ciphers = task.suites.join(':');
  if (task.own) Object.assign(made, read(task.own));
  if (task.ca) Object.assign(made, {ca: fs.readFileSync(task.ca), requestCert: true, rejectUnauthorized: true});
  if (task.psk) {
    const key = Buffer.from(task.psk.key, 'hex');
    // Node has plain external PSKs with suites of SHA-256.
    made.ciphers = task.suites.length ? made.ciphers : 'TLS_AES_128_GCM_SHA256';
    made.checkServerIdentity = () => undefined;
    made.pskCallback = task.role === 'client'
      ? () => ({psk: key, identity: task.psk.identity})
      : (_, identity) => identity === task.psk.identity ? key : null;
  }
  return made;
}

const read = (own) => ({cert: fs.readFileSync(own.chain), key: fs.readFileSync(own.key)});

function text(role, size) {
  const lines = [];
  for (let number = 0, length = 0; length < size; number++) {
    const line = `${role} ${String(number).padStart(8, '0')}\n`;
    lines.push(line);
    length += line.length;
  }
  return Buffer.from(lines.join('')).subarray(0, size);
}

// One conversation; a secure connection is on the socket.
function talk(socket, task, keyLog) {
  return new Promise((resolve, reject) => {
    const digest = crypto.createHash('sha256');
    const speaksFirst = task.first === task.role;
    let received = 0, spoken = false, ended = false, told = null;
    const speak = () => {
      spoken = true;
      socket.write(text(task.role, task.size));
      if (task.half_close && speaksFirst) socket.end();
    };
    const look = () => {
      if (!told) {
        const shown = socket.getPeerX509Certificate?.();
        told = {
          suite: socket.getCipher().standardName, alpn: socket.alpnProtocol || '',
          resumed: task.psk ? null : socket.isSessionReused(), server_name: socket.servername || null,
          peer: shown ? crypto.createHash('sha256').update(shown.raw).digest('hex') : null,
          exporter: socket.exportKeyingMaterial(32, task.exporter, Buffer.alloc(0)).toString('hex'),
        };
      }
    };
    const check = () => {
      if (received > task.size) return socket.destroy(new Error(`${received - task.size} bytes too many`));
      const heard = received === task.size && (ended || !task.half_close || speaksFirst);
      if (heard && !spoken) speak();
      if (heard) { look(); socket.end(); }
      if (ended && received < task.size) socket.destroy(new Error(`the end after ${received} bytes`));
    };
    socket.on('data', (data) => { digest.update(data); received += data.length; check(); });
    socket.on('end', () => { ended = true; check(); });
    socket.on('error', reject);
    socket.on('close', () => told && received === task.size
      ? resolve({...told, key_log: keyLog, received: digest.digest('hex')})
      : reject(new Error('closed in the middle')));
    if (task.first === null || speaksFirst) speak();
  });
}

function serve(task) {
  return new Promise((resolve, reject) => {
    const reports = [];
    const server = tls.createServer(options(task));
    if (task.other) server.addContext(task.other.name, read(task.other));
    let keyLog = [];
    server.on('keylog', (line) => keyLog.push(line.toString().trim()));
    server.on('tlsClientError', (error) => { server.close(); reject(error); });
    server.on('secureConnection', (socket) => talk(socket, task, keyLog).then((report) => {
      reports.push(report);
      keyLog = [];
      if (reports.length === task.connections) { server.close(); resolve(reports); }
    }, (error) => { server.close(); reject(error); }));
    server.listen(0, '127.0.0.1', () => say({id: task.id, listening: server.address().port}));
  });
}

function connect(task, session) {
  return new Promise((resolve, reject) => {
    const keyLog = [];
    let ticket;
    const socket = tls.connect({...options(task), host: '127.0.0.1', port: task.port,
      servername: task.server_name ?? '', session});
    socket.on('keylog', (line) => keyLog.push(line.toString().trim()));
    socket.on('session', (given) => { ticket = given; });
    socket.on('error', reject);
    socket.on('secureConnect', () => talk(socket, task, keyLog).then(
      (report) => resolve([report, ticket]), reject));
  });
}

async function run(task) {
  if (task.role === 'server') return serve(task);
  const reports = [];
  let session;
  for (let number = 0; number < task.connections; number++) {
    const [report, ticket] = await connect(task, session);
    session = ticket;
    reports.push(report);
  }
  return reports;
}

say({version: `${process.versions.node}, OpenSSL ${process.versions.openssl}`});
readline.createInterface({input: process.stdin}).on('line', (line) => {
  const task = JSON.parse(line);
  run(task).then((reports) => say({id: task.id, reports}),
    (error) => say({id: task.id, error: `${error.code ?? error.name}: ${error.message}`}));
});
