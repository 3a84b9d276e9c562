// Opens connections to ctl.sock and api.sock and holds them without a word, detached from the tool call that
// started it, until the cell ends.
const net = require("net");
const held = { ctl: 0, api: 0, errors: 0 };
for (let i = 0; i < 64; i++) {
  for (const name of ["ctl", "api"]) {
    const socket = net.connect(`/.hotcell/${name}.sock`, () => held[name]++);
    socket.on("error", () => held.errors++);
    socket.on("data", () => {});
  }
}
setTimeout(() => console.log("ZOO " + JSON.stringify({ held })), 500);
setInterval(() => {}, 1000);
