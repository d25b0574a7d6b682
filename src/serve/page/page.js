// The console's page: a ticket becomes a cookie, and tabs show the machine.

const here = location.pathname.replace(/\/$/, "");
const find = (id) => document.getElementById(id);
const say = (text) => { find("message").textContent = text; };
// Is the terminal's program here?
const PROGRAM = typeof Terminal !== "undefined" && typeof FitAddon !== "undefined";

async function ask(method, body) {
  const answer = await fetch(`${here}/session`, {
    method,
    headers: body ? { "content-type": "application/json" } : {},
    body: body && JSON.stringify(body),
  });
  const text = await answer.text();
  const value = text ? JSON.parse(text) : {};
  return { status: answer.status, value };
}

// Is the machine shown already?
let shown = false;

async function enter(ticket) {
  const { status, value } = await ask("POST", { ticket });
  if (status >= 400) {
    say(`This did not work: ${value.error}.`);
    return;
  }
  say("");
  // What is open belongs to the session before; the same ticket (200) opens no other.
  if (shown && status === 204) location.reload();
}

// The session is over, or the server does not know it: what is open is of no use any more.
function lost() {
  history.replaceState(null, "", `${here}#refused=over`);
  location.reload();
}

// Text without the terminal's program. What it would make of colours and cursors is left out.
function plain(section) {
  const text = document.createElement("pre");
  const decoder = new TextDecoder();
  section.append(text);
  return {
    write(data) {
      const piece = typeof data === "string" ? data : decoder.decode(data, { stream: true });
      text.append(piece.replace(/\x1b\[[0-9;?]*[ -/]*[@-~]|[^\n\t\x20-\x7e\u00a0-\uffff]/g, ""));
      section.scrollTop = section.scrollHeight;
    },
    fit() {}, focus() {}, dispose() { text.remove(); },
  };
}

// The same with it.
function rich(section, options) {
  const terminal = new Terminal({ scrollback: 10000, fontSize: 14, ...options });
  const addon = new FitAddon.FitAddon();
  terminal.loadAddon(addon);
  terminal.open(section);
  terminal.fit = () => addon.fit();
  return terminal;
}

// One window of text that a WebSocket fills.
function view(name, mode) {
  const section = find(name);
  const typing = name === "terminal" && mode === "full";
  if (!PROGRAM && name === "terminal") {
    const text = plain(section);
    text.write("The terminal's program is not installed: the operator runs contrib/console-assets.");
    return { show() {}, close() { text.dispose(); } };
  }
  const terminal = PROGRAM
    ? rich(section, { convertEol: name === "serial", disableStdin: !typing, cursorBlink: typing })
    : plain(section);
  const socket = new WebSocket(`wss://${location.host}${here}/${name}`);
  socket.binaryType = "arraybuffer";
  const open = () => socket.readyState === WebSocket.OPEN;
  const resize = () => {
    // Somebody else's terminal is as large as its own window.
    if (section.hidden || section.classList.contains("theirs")) return;
    terminal.fit();
    if (typing && open()) socket.send(JSON.stringify({ columns: terminal.cols, rows: terminal.rows }));
  };
  const observer = new ResizeObserver(resize);
  const shown = {
    over: false,
    show() { resize(); terminal.focus(); },
    close() { observer.disconnect(); socket.close(); terminal.dispose(); section.classList.remove("theirs"); },
  };
  const end = (text) => {
    if (shown.over) return;
    shown.over = true;
    terminal.write(`\r\n\x1b[7m ${text}; choose the tab again to go on \x1b[0m\r\n`);
  };
  socket.onopen = resize;
  socket.onmessage = ({ data }) => {
    if (typeof data !== "string") {
      terminal.write(new Uint8Array(data));
      return;
    }
    const word = JSON.parse(data);
    if (word.end !== undefined) end(word.end);
    if (word.note !== undefined) say(word.note);
    if (word.size !== undefined && PROGRAM) {
      section.classList.add("theirs");
      terminal.resize(word.size.columns, word.size.rows);
    }
  };
  socket.onclose = () => end("the connection has ended");
  if (typing) {
    const encoder = new TextEncoder();
    terminal.onData((keys) => { if (open()) socket.send(encoder.encode(keys)); });
    terminal.onBinary((keys) => { if (open()) socket.send(Uint8Array.from(keys, (c) => c.charCodeAt(0))); });
  }
  observer.observe(section);
  return shown;
}

// The machine's screen, by spice-html5 as its package has it.
async function screen() {
  const { SpiceMainConn } = await import("/spice/main.js");
  const answer = await fetch(`${here}/pass`, { method: "POST" });
  const value = await answer.json();
  if (answer.status === 401) lost();
  if (!answer.ok) {
    delete views.screen;
    say(`The screen cannot be shown: ${value.error}.`);
    return;
  }
  let why = "the connection has ended";
  const viewer = new SpiceMainConn({
    uri: `wss://${location.host}${here}/screen`,
    screen_id: "screen",
    password: value.password,
    onerror: (error) => {
      delete views.screen;
      viewer.stop();
      say(error.message === "Permission denied."
        ? "The screen is not shown: somebody who may type looks at it, or it was taken over too often in the last minute."
        : `The screen was closed: ${why}. Choose the tab again to see it.`);
    },
  });
  // Of what its main channel warns of, all that is not its own is the console's last word.
  viewer.log_warn = (text) => {
    if (!/^Unimplemented|Unknown message/.test(text)) why = text;
  };
}

const views = {};
const TABS = ["terminal", "screen", "serial"];

async function choose(name, mode) {
  for (const other of TABS) {
    find(other).hidden = other !== name;
    find(`tab-${other}`).setAttribute("aria-selected", String(other === name));
  }
  if (name === "screen") {
    views.screen ??= screen().catch(() => {
      delete views.screen;
      say("The screen's program is not installed: the operator installs the package spice-html5.");
    });
    return;
  }
  const ended = views[name]?.over ? views[name] : null;
  if (ended) {
    if ((await ask("GET")).status !== 200) {
      lost();
      return;
    }
    if (views[name] === ended) {
      ended.close();
      delete views[name];
    }
  }
  views[name] ??= view(name, mode);
  views[name].show();
}

function show(job) {
  shown = true;
  find("entry").hidden = true;
  find("tabs").hidden = false;
  find("title").textContent = job.name;
  document.title = `${job.name} · cannery console`;
  const seeing = job.mode === "full" ? "" : " · you may only see";
  find("about").textContent = `${job.project} · ${job.image ?? ""}${seeing}`;
  for (const name of TABS) {
    find(`tab-${name}`).onclick = () => choose(name, job.mode);
  }
  find("viewer").hidden = !job.viewers;
  find("viewer").href = `${here}/console.vv`;
  find("leave").onclick = async () => {
    await ask("DELETE");
    location.reload();
  };
  choose("terminal", job.mode);
}

const REFUSED = {
  stale: "This sign-in was not begun in this browser, or too long ago. Please try again.",
  denied: "The sign-in was denied at GitLab.",
  code: "GitLab does not know this sign-in any more. Please try again.",
  role: "Only Developers of the job's project and above may open its console.",
  gitlab: "GitLab did not answer as expected; the operator's log says more.",
  full: "There are as many console sessions as this host allows.",
  over: "This session is over.",
};

async function begin() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const handed = fragment.get("ticket");
  say(REFUSED[fragment.get("refused")] ?? "");
  // Neither the history nor whoever looks at the screen keeps it.
  if (location.hash) history.replaceState(null, "", here);
  if (handed) await enter(handed);
  if (shown) return;
  const { status, value } = await ask("GET");
  if (status === 200) {
    show(value);
    return;
  }
  find("entry").hidden = false;
  find("gitlab").hidden = !value.gitlab;
  find("gitlab").firstElementChild.href = `${here}/login`;
  find("ticket").focus();
}

find("entry").onsubmit = async (event) => {
  event.preventDefault();
  const field = find("ticket");
  const ticket = field.value.trim();
  field.value = "";
  await enter(ticket);
  await begin();
};

// A ticket that is put behind the address of a page that is open loads no page anew.
window.onhashchange = () => { if (location.hash) begin(); };

begin();
