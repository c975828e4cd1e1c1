// liboqs's ML-KEM as WebAssembly, behind lines of JSON: a question each, an answer each. The keys are
// made for the test and worth nothing.
import path from 'node:path';
import readline from 'node:readline';
import {pathToFileURL} from 'node:url';

const oqs = await import(pathToFileURL(path.join(process.argv[2], 'src', 'index.js')));
const kems = {
  'ML-KEM-512': await oqs.createMLKEM512(),
  'ML-KEM-768': await oqs.createMLKEM768(),
  'ML-KEM-1024': await oqs.createMLKEM1024(),
};
const hex = (bytes) => Buffer.from(bytes).toString('hex');
const bytes = (text) => new Uint8Array(Buffer.from(text, 'hex'));
const secretKeys = {};

function answer(question) {
  const kem = kems[question.kem];
  if (question.generate) {
    const {publicKey, secretKey} = kem.generateKeyPair();
    secretKeys[question.kem] = secretKey;
    return {public: hex(publicKey)};
  }
  if (question.encapsulate) {
    const {ciphertext, sharedSecret} = kem.encapsulate(bytes(question.encapsulate));
    return {ciphertext: hex(ciphertext), secret: hex(sharedSecret)};
  }
  return {secret: hex(kem.decapsulate(bytes(question.decapsulate), secretKeys[question.kem]))};
}

readline.createInterface({input: process.stdin}).on('line',
  (line) => console.log(JSON.stringify(answer(JSON.parse(line)))));
