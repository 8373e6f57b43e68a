// The socket to the workbench: requests with answers, what is running, and the badge.

export class Refused extends Error {}  // the workbench said no; the message is for the user

export class Link extends EventTarget {
  constructor() {
    super();
    this.waiting = new Map();  // requests without an end yet, by number
    this.number = 0;
    this.token = new URLSearchParams(location.search).get("token");
  }

  // Opens the socket. It is not opened again after a loss: the tab's edits would be gone, so the page says so.
  open() {
    const query = this.token ? `?token=${encodeURIComponent(this.token)}` : "";
    this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/socket${query}`);
    this.socket.onmessage = (event) => this.take(JSON.parse(event.data));
    this.socket.onclose = (event) => {
      for (const request of this.waiting.values()) request.reject(new Refused("the connection is closed"));
      this.waiting.clear();
      this.tell("closed", event.reason);
      this.tell("busy");
    };
    return new Promise((resolve, reject) => { this.socket.onopen = resolve; this.socket.onerror = reject; });
  }

  tell(name, detail) { this.dispatchEvent(new CustomEvent(name, {detail})); }

  // Ask for something. `part` is given what is there before the end. Resolves to null where a newer request took over
  // or it was stopped.
  ask(name, fields = {}, part = null, quiet = false) {
    if (this.socket.readyState !== WebSocket.OPEN)
      return Promise.reject(new Refused("The workbench is gone. Reload the page."));
    const id = ++this.number;
    this.socket.send(JSON.stringify({...fields, id, do: name}));
    return new Promise((resolve, reject) => {
      this.waiting.set(id, {resolve, reject, part, name, quiet, state: null, began: performance.now()});
      setTimeout(() => this.tell("busy"), 150);
    });
  }

  stop() { this.socket.send(JSON.stringify({id: ++this.number, do: "stop"})); }

  file(word) { return `files/${word}` + (this.token ? `?token=${encodeURIComponent(this.token)}` : ""); }

  take(answer) {
    if (answer.kind === "badge") return this.tell("badge", answer);
    const request = this.waiting.get(answer.id);
    if (!request) return answer.kind === "error" ? this.tell("error", answer.text) : undefined;
    if (answer.kind === "part") return request.part?.(answer.value);
    if (["waiting", "started", "progress"].includes(answer.kind)) { request.state = answer; return this.tell("busy"); }
    this.waiting.delete(answer.id);
    this.tell("busy");
    if (answer.kind === "done") {
      for (const note of answer.notes) this.tell("note", note);
      request.resolve(answer.value);
    } else if (answer.kind === "error") request.reject(new Refused(answer.text));
    else { if (answer.kind === "stopped" && !request.quiet) this.tell("stopped", request.name); request.resolve(null); }
  }

  // What to say of the requests that are not done: the one that runs, else the first that waits.
  get busy() {
    const open = [...this.waiting.values()].filter((request) => !request.quiet);
    const running = open.find((request) => request.state?.kind === "progress");
    return running ?? open.find((request) => request.state) ?? open[0];
  }
}
