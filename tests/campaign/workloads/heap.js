// Buffers and objects that know what they must contain, under garbage collection: node heap.js SECONDS MIB
"use strict";
const [seconds, mib] = process.argv.slice(2).map(Number);
const WORDS = 32768; // 256 KiB
const count = mib * 4;
const versions = new Uint32Array(count);
const buffers = [];
let state = 12345;
const random = (below) => (state = (Math.imul(state, 1103515245) + 12345) >>> 0) % below;
const word = (i, version, w) => (Math.imul(i * 8191 + version * 131 + 1, 2654435761) + Math.imul(w, 40503)) >>> 0;

function fill(i) {
  const words = new Uint32Array(buffers[i].buffer, buffers[i].byteOffset, WORDS * 2);
  for (let w = 0; w < words.length; w++) words[w] = word(i, versions[i], w);
}

function check(i) {
  const words = new Uint32Array(buffers[i].buffer, buffers[i].byteOffset, WORDS * 2);
  for (let w = 0; w < words.length; w++) {
    if (words[w] !== word(i, versions[i], w)) {
      console.log(`CORRUPT buffer ${i} word ${w}`);
      process.exit(9);
    }
  }
}

for (let i = 0; i < count; i++) {
  buffers.push(Buffer.alloc(WORDS * 8));
  fill(i);
}
const objects = new Map();
for (let i = 0; i < 100000; i++) objects.set(`key ${i}`, { id: i, square: i * i, text: `value of ${i}`, list: [i, i + 1, i + 2] });

let looks = 0, writes = 0;
const end = Date.now() + seconds * 1000;
console.log("READY");
function turn() {
  for (let n = 0; n < 40; n++) {
    const i = random(count);
    check(i);
    looks++;
    if (n % 10 === 0) {
      versions[i] = random(3);
      if (random(2)) buffers[i] = Buffer.alloc(WORDS * 8); // fresh memory: zeros
      else if (random(4) === 0) buffers[i].fill(0);
      fill(i);
      writes++;
    }
  }
  const garbage = [];
  for (let n = 0; n < 3000; n++) {
    const i = random(100000), found = objects.get(`key ${i}`);
    if (found.id !== i || found.square !== i * i || found.text !== `value of ${i}` || found.list[2] !== i + 2) {
      console.log(`CORRUPT object ${i}`);
      process.exit(9);
    }
    objects.set(`key ${i}`, { id: i, square: i * i, text: `value of ${i}`, list: [i, i + 1, i + 2] });
    garbage.push(new Array(50).fill(i));
  }
  if (Date.now() < end) setTimeout(turn, 20);
  else {
    for (let i = 0; i < count; i++) check(i);
    console.log(`OK looks=${looks} writes=${writes}`);
  }
}
turn();
