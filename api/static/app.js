/* The page: a list of runs, and one run with its curves. Data goes into the document as text, never as markup. */

import { Chart, Curve, compact, drawSparkline } from "./charts.js";
import { Refused, ask, follow, openFile, setKey } from "./server.js";

const POLL_MILLISECONDS = 2000;
const SELDOM = 5; // every so many polls: what seldom changes
const CURVE_POINTS = 4000;
const THIN_AGAIN = 20_000; // events after which the curves are fetched anew: a page may be open for days
const CURVES = ["train_loss", "val_loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second"];
const ENDED = ["succeeded", "failed", "cancelled"];

const byId = (id) => document.getElementById(id);
/* Relative to the page: a reverse proxy may serve it below a path of its own. */
const path = (id, rest = "") => `jobs/${encodeURIComponent(id)}${rest}`;

// ---- saying things

const troubles = { poll: "", action: "" };

/* Says at the top of the page what does not work; with no text, that it does again. An action's stays until the next. */
function complain(what, text = "") {
  troubles[what] = text;
  const shown = troubles.poll || troubles.action;
  fill(byId("connection"), shown);
  byId("connection").hidden = !shown;
}

/* For those who hear the page. */
function tell(text) {
  byId("news").textContent = text;
}

// ---- numbers and times for people

const count = (number) => Math.round(number).toLocaleString("en");
// what is no finite number comes as null, "NaN" or "Infinity"
const fixed = (number, digits) => (number == null ? "–" : Number(number).toFixed(digits));
const loss = (number) => fixed(number, number < 10 ? 3 : 1);

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

function moment(text) {
  const time = new Date(text);
  const today = new Date().toDateString() === time.toDateString();
  return today ? time.toLocaleTimeString() : time.toLocaleDateString();
}

function ranSeconds(job) {
  return job.started_at ? (new Date(job.finished_at ?? Date.now()) - new Date(job.started_at)) / 1000 : null;
}

function statusText(job) {
  return job.phase && !ENDED.includes(job.status) ? `${job.status} · ${job.phase}` : job.status;
}

function showStatus(pill, job) {
  fill(pill, statusText(job));
  pill.dataset.status = job.status;
}

function element(name, className = "", ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children); // strings become text
  return made;
}

/* Gives a node these children; one that has their like already keeps its own, and with them selection and focus. */
function fill(node, ...children) {
  const wanted = node.cloneNode();
  wanted.append(...children);
  if (!wanted.isEqualNode(node)) node.replaceChildren(...wanted.childNodes);
}

// ---- the list of runs

class Row {
  constructor(id) {
    this.id = id;
    this.link = element("a");
    this.link.href = `#${id}`;
    this.pill = element("span", "pill");
    this.bar = element("progress");
    this.bar.max = 1;
    this.steps = element("span", "quiet");
    this.spark = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.spark.setAttribute("class", "spark");
    this.spark.setAttribute("aria-hidden", "true");
    this.loss = element("td", "number");
    this.speed = element("td", "number");
    this.left = element("td", "number");
    this.created = element("td", "number quiet");
    const name = element("th", "", this.link, element("code", "quiet", id));
    name.scope = "row";
    const cells = [
      name, element("td", "", this.pill), element("td", "steps", this.bar, this.steps), this.loss,
      element("td", "", this.spark), this.speed, this.left, this.created,
    ]; // prettier-ignore
    const heads = document.querySelectorAll("#runs thead th");
    cells.forEach((cell, at) => (cell.dataset.head = heads[at].textContent));
    this.node = element("tr", "", ...cells);
    this.seen = null; // step and status that the curve was drawn for
  }

  update(job) {
    this.link.textContent = job.name;
    showStatus(this.pill, job);
    this.bar.value = job.progress;
    this.bar.setAttribute("aria-label", `Progress of ${job.name}`);
    this.steps.textContent = job.total_steps ? `${count(job.step)} / ${count(job.total_steps)}` : "";
    this.speed.textContent = job.tokens_per_second ? compact.format(job.tokens_per_second) : "–";
    this.left.textContent = ENDED.includes(job.status)
      ? "–"
      : job.eta_seconds != null
        ? duration(job.eta_seconds)
        : job.queue_position
          ? `${job.queue_position}. in queue`
          : "–";
    this.created.textContent = moment(job.created_at);
    for (const cell of [this.speed, this.left, this.loss]) cell.classList.toggle("none", cell.textContent === "–" || !cell.textContent);
  }

  needsCurve(job) {
    return job.kind === "train" && this.seen !== `${job.step} ${job.status}`;
  }

  drawCurve(job, sparkline) {
    const [train, val] = [Curve.from(sparkline.train_loss), Curve.from(sparkline.val_loss)];
    drawSparkline(this.spark, train);
    const best = job.best_checkpoint ? element("span", "quiet", ` val ${loss(job.best_checkpoint.val_loss)}`) : "";
    this.loss.replaceChildren(loss(train.last ?? val.last), best);
    this.loss.classList.toggle("none", train.last == null);
    this.seen = `${job.step} ${job.status}`;
  }
}

const list = { rows: new Map(), pages: 1 };

async function refreshList() {
  const [jobs, more] = await recentJobs(list.pages);
  const ids = new Set(jobs.map((job) => job.id));
  for (const [id, row] of list.rows) {
    if (ids.has(id)) continue;
    row.node.remove();
    list.rows.delete(id);
  }
  const body = document.querySelector("#runs tbody");
  jobs.forEach((job, at) => {
    if (!list.rows.has(job.id)) list.rows.set(job.id, new Row(job.id));
    const row = list.rows.get(job.id);
    if (body.children[at] !== row.node) body.insertBefore(row.node, body.children[at] ?? null);
    row.update(job);
  });
  byId("runs").hidden = !jobs.length;
  byId("empty").hidden = jobs.length > 0;
  byId("older").hidden = !more;
  const changed = jobs.filter((job) => list.rows.get(job.id).needsCurve(job));
  for (let at = 0; at < changed.length; at += 100) await drawCurves(changed.slice(at, at + 100));
}

async function drawCurves(jobs) {
  const sparklines = await ask(`sparklines?job=${jobs.map((job) => job.id).join("&job=")}`);
  for (const job of jobs) list.rows.get(job.id)?.drawCurve(job, sparklines[job.id]);
}

async function recentJobs(pages) {
  const jobs = [];
  let after = "";
  for (let page = 0; page < pages; page++) {
    const answer = await ask(`jobs?view=summary&limit=50${after}`);
    jobs.push(...answer.data);
    if (!answer.has_more) return [jobs, false];
    after = `&after=${encodeURIComponent(answer.next)}`;
  }
  return [jobs, true];
}

async function jobsAbout(id) {
  return (await ask(`jobs?view=summary&limit=100&parent_job_id=${id}`)).data;
}

async function refreshWorkers() {
  const slots = (await ask("workers")).filter((node) => node.live).flatMap((node) => node.slots);
  const busy = slots.filter((slot) => slot.job_id).length;
  byId("workers").textContent = slots.length ? `${busy} of ${slots.length} slots busy` : "no worker is live";
}

byId("older").addEventListener("click", () => {
  list.pages++;
  poll();
});

// ---- one run

const charts = {
  loss: new Chart(byId("loss-chart"), {
    height: 340,
    legend: true,
    series: [
      { label: "train", color: "--train", faint: true },
      { label: "train, smoothed", color: "--train" },
      { label: "validation", color: "--val", dots: true },
    ],
  }),
  speed: new Chart(byId("speed-chart"), { height: 150, series: [{ label: "tokens/s", color: "--train" }] }),
  lr: new Chart(byId("lr-chart"), { height: 150, series: [{ label: "lr", color: "--train" }] }),
  grad: new Chart(byId("grad-chart"), { height: 150, series: [{ label: "norm", color: "--train" }] }),
};

class RunView {
  constructor(id) {
    this.id = id;
    this.job = null;
    this.aboutIt = []; // jobs: evaluations of this run, and what publishes it
    this.polled = 0;
    this.curves = null;
    this.complete = false; // whether the curves are all that there will be
    this.stream = null; // what stops it; null: poll() opens one
    this.drawn = true;
    this.goOnKey = crypto.getRandomValues(new Uint32Array(4)).join("-"); // clicked twice it makes one job
    for (const chart of Object.values(charts)) chart.clear();
    byId("run-view").classList.add("unknown");
    byId("run-title").textContent = "";
    byId("samples-card").hidden = true;
    this.sampled = 0; // how often, by the steps made
    byId("job-link").href = path(id);
    byId("metrics-link").href = path(id, "/metrics");
    byId("log-link").href = path(id, "/logs");
  }

  /* All there is so far, then each event as it comes. */
  async open() {
    const ended = ENDED.includes(this.job.status); // before it is asked for: it may end meanwhile
    const answer = await ask(path(this.id, `/metrics?max_points=${CURVE_POINTS}&keys=${CURVES.join("&keys=")}`));
    if (view !== this) return;
    this.curves = Object.fromEntries(CURVES.map((key) => [key, Curve.from(answer.series[key])]));
    this.complete = ended;
    this.taken = 0;
    this.draw();
    if (document.hidden || ended) return;
    this.follow(answer.last_event_id);
  }

  async follow(after) {
    this.close(); // two polls at a time open one each
    const stream = (this.stream = new AbortController());
    try {
      await follow(path(this.id, `/metrics?after=${after}`), stream.signal, (type, event) => {
        if (type === "end") poll();
        else this.take(event);
      });
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof Refused || error.name === "AbortError")) throw error;
    } finally {
      if (this.stream === stream) this.stream = null; // ended or lost: poll() looks which, and opens another
    }
  }

  close() {
    this.stream?.abort();
  }

  take(event) {
    for (const key of CURVES) if (event[key] != null) this.curves[key].put(event.step, event[key]);
    if (event.type === "evaluated") tell(`Step ${event.step}: validation loss ${loss(event.val_loss)}`);
    this.draw();
    if (++this.taken === THIN_AGAIN) this.close(); // poll() opens it anew
  }

  async refresh() {
    const job = await ask(path(this.id));
    const aboutIt = job.kind === "train" ? (await ask(`jobs?view=summary&limit=100&parent_job_id=${job.id}`)).data : [];
    if (view !== this) return;
    const before = this.job?.status;
    this.job = job;
    this.aboutIt = aboutIt;
    if (before && before !== job.status) tell(`${job.name} is ${job.status}`);
    this.showJob();
    await this.showSamples();
    if (!this.stream && !this.complete) await this.open();
  }

  showJob() {
    const { job } = this;
    byId("run-view").classList.remove("unknown");
    document.title = `${job.name} · ${job.status} · Trainmaster`;
    fill(byId("run-title"), job.name);
    fill(byId("run-id"), job.id);
    fill(
      byId("run-labels"),
      ...Object.entries(job.labels).map(([key, value]) => element("span", "label", `${key}=${value}`)),
    );
    showStatus(byId("run-status"), job);
    fill(byId("run-reason"), job.error ? "" : job.status_reason);
    const parent = element("a", "", `about ${job.parent_job_id}`);
    parent.href = `#${job.parent_job_id}`;
    fill(byId("run-parent"), job.parent_job_id ? parent : "");
    const pause = byId("pause");
    pause.hidden = ENDED.includes(job.status) && !canGoOn(job);
    pause.disabled = ["pausing", "cancelling"].includes(job.status);
    pause.textContent = canGoOn(job) ? "Go on" : job.status === "paused" ? "Resume" : "Pause";
    pause.title = canGoOn(job) ? "from the last checkpoint, as a new job" : "";
    const cancel = byId("cancel");
    cancel.hidden = ENDED.includes(job.status);
    cancel.disabled = job.status === "cancelling";
    byId("run-progress").value = job.progress;
    fill(
      byId("run-steps"),
      job.total_steps ? `step ${count(job.step)} of ${count(job.total_steps)}` : `${Math.round(100 * job.progress)} %`,
    );
    const warnings = ENDED.includes(job.status) ? [] : (job.plan?.warnings ?? []);
    byId("run-warnings").hidden = !warnings.length;
    fill(byId("run-warnings"), warnings.length ? `When it was submitted: ${warnings.join("; ")}` : "");
    byId("run-error").hidden = !job.error;
    fill(byId("error-message"), job.error ? `${job.error.reason}: ${job.error.message}` : "");
    fill(byId("error-log"), job.error?.log.join("\n") ?? "");
    byId("error-log").hidden = !job.error?.log.length;
    for (const part of document.querySelectorAll(".train-only")) part.hidden = job.kind !== "train";
    fill(byId("spec"), JSON.stringify(job.spec, null, 2));
    this.showFigures();
    this.showResults();
  }

  /* What the model wrote as it trained, newest first. */
  async showSamples() {
    const { spec, step } = this.job;
    const sampled = spec.sample ? Math.floor(step / spec.sample.every_steps) + (step === spec.max_steps) : 0;
    if (sampled <= this.sampled) return;
    const samples = await ask(path(this.id, "/samples"));
    if (view !== this || !samples.length) return;
    // a sample is written after its step was told: this one may still be missing
    this.sampled = samples.at(-1).step > step - spec.sample.every_steps ? sampled : this.sampled;
    const shown = samples.reverse().map((one) => [
      element("p", "quiet", `step ${count(one.step)}`), element("pre", "", one.prompt + one.text),
    ]); // prettier-ignore
    byId("samples").replaceChildren(...shown.flat());
    byId("samples-card").hidden = false;
  }

  /* What evaluations and publishing came to: this job's, and those of the jobs about it. */
  showResults() {
    const own = outcome(this.job);
    const line = (...parts) => element("li", "", ...parts.flatMap((part) => [part, " "]));
    const items = own.length ? [line(...own)] : [];
    for (const job of [...this.aboutIt].reverse()) {
      const [link, pill] = [element("a", "", job.name), element("span", "pill")];
      link.href = `#${job.id}`;
      showStatus(pill, job);
      items.push(line(link, pill, ...outcome(job)));
    }
    byId("results-card").hidden = !items.length;
    fill(byId("results"), ...items);
  }

  showFigures() {
    const { job, curves } = this;
    const best = job.best_checkpoint;
    const ran = ranSeconds(job);
    const ofTraining = [
      ["Train loss", loss(curves?.train_loss.last)],
      ["Best validation loss", best ? loss(best.val_loss) : "–", best ? `step ${count(best.step)}` : ""],
      ["Bits per byte", loss(curves?.bits_per_byte.last)],
      ["Tokens per second", job.tokens_per_second ? compact.format(job.tokens_per_second) : "–", mfu(job)],
      ["Tokens seen", compact.format(job.tokens_seen), job.plan ? `of ${compact.format(job.plan.total_tokens)}` : ""],
      ["Parameters", job.plan ? compact.format(job.plan.parameters) : "–"],
    ];
    const figures = [
      ...(job.kind === "train" ? ofTraining : []),
      ENDED.includes(job.status)
        ? ["Took", ran === null ? "–" : duration(ran)]
        : ["Time left", job.eta_seconds == null ? "–" : duration(job.eta_seconds), ran === null ? "" : `${duration(ran)} so far`],
      ["Attempt", job.attempt || "–", job.nodes.map((node) => node.slot).join(", ")],
    ];
    fill(
      byId("figures"),
      ...figures.map(([what, value, more]) => {
        return element("div", "card", element("dt", "", what), element("dd", "", value, element("small", "quiet", more || "")));
      }),
    );
  }

  /* At most once a frame, however fast events come. */
  draw() {
    if (!this.drawn) return;
    this.drawn = false;
    requestAnimationFrame(() => {
      this.drawn = true;
      if (view !== this) return;
      this.showFigures();
      this.drawCharts();
    });
  }

  drawCharts() {
    const { train_loss: train, val_loss: val, tokens_per_second: speed, lr, grad_norm: grad } = this.curves;
    const smooth = train.smoothed(Number(byId("smoothing").value));
    charts.loss.show(uPlot.join([[train.steps, train.values, smooth], [val.steps, val.values]])); // prettier-ignore
    charts.speed.show([speed.steps, speed.values]);
    charts.lr.show([lr.steps, lr.values]);
    charts.grad.show([grad.steps, grad.values]);
    const at = train.steps.at(-1) ?? 0;
    describe("loss-chart", `Loss by step. At step ${at}: train ${loss(train.last)}, validation ${loss(val.last)}`);
    describe("speed-chart", `Tokens per second by step, now ${count(speed.last ?? 0)}`);
    describe("lr-chart", `Learning rate by step, now ${lr.last ?? "unknown"}`);
    describe("grad-chart", `Gradient norm by step, now ${loss(grad.last)}`);
  }
}

function describe(id, text) {
  byId(id).setAttribute("aria-label", text);
}

/* A job's results, by name, and where it published. */
function outcome(job) {
  const found = Object.entries(job.results).map(([name, value]) => element("span", "", `${name} ${fixed(value, 4)}`));
  if (job.published?.url.startsWith("https://")) {
    const link = element("a", "", `${job.published.repo} at ${job.published.tag}`);
    link.href = job.published.url;
    found.push(link);
  }
  return found;
}

function mfu(job) {
  return job.mfu ? `${(100 * job.mfu).toFixed(1)} % MFU` : "";
}

byId("log-scale").addEventListener("change", (event) => charts.loss.setLog(event.target.checked));
byId("smoothing").addEventListener("input", (event) => {
  byId("smoothing-value").textContent = Number(event.target.value).toFixed(2);
  if (view.curves) view.draw();
});

// ---- pausing, going on and cancelling

function canGoOn(job) {
  return job.kind === "train" && ["failed", "cancelled"].includes(job.status);
}

/* What is left of a run that has ended, as a new job: its page is shown. */
async function goOn(id) {
  const overrides = { init_from: { source: id, optimizer: true } };
  const headers = { "Idempotency-Key": view.goOnKey };
  const job = await ask("jobs", { method: "POST", headers, body: JSON.stringify({ from: id, overrides }) });
  location.hash = job.id;
}

byId("pause").addEventListener("click", async () => {
  const { id, job } = view;
  await attempt(() =>
    canGoOn(job) ? goOn(id) : ask(path(id, job.status === "paused" ? "/resume" : "/pause"), { method: "POST" }),
  );
  poll();
});

const dialog = byId("cancel-dialog");
byId("cancel").addEventListener("click", () => {
  byId("cancel-question").textContent = `Cancel ${view.job.name}?`;
  dialog.showModal();
});
byId("cancel-no").addEventListener("click", () => dialog.close());
byId("cancel-yes").addEventListener("click", async () => {
  dialog.close();
  await attempt(() => ask(path(view.id, "/cancel"), { method: "POST" }));
  poll();
});

// ---- the key

const keyDialog = byId("key-dialog");
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  complain("action");
  byId("key").value = "";
  keyDialog.close();
  poll();
});

for (const link of document.querySelectorAll(".links a")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    attempt(() => openFile(link.href));
  });
}

// ---- which view, and keeping it fresh

let view = null; // a RunView, or null for the list

async function attempt(action, what = "action") {
  try {
    await action();
    complain(what);
  } catch (error) {
    if (error instanceof Refused) {
      complain(what, error.message);
      if (error.needsKey && !keyDialog.open) keyDialog.showModal();
    } else if (error instanceof TypeError || error instanceof SyntaxError) {
      complain(what, what === "poll" ? "The server does not answer; trying again." : "The server did not answer; try again.");
    } else throw error;
  }
}

let timer = 0;
let polled = 0;

async function poll() {
  clearTimeout(timer);
  if (!document.hidden) {
    const shown = view;
    const workers = polled++ % SELDOM === 0 ? [refreshWorkers()] : [];
    await attempt(() => Promise.all([shown ? shown.refresh() : refreshList(), ...workers]), "poll");
  }
  clearTimeout(timer);
  timer = setTimeout(poll, POLL_MILLISECONDS);
}

function route() {
  const id = location.hash.slice(1);
  view?.close();
  dialog.close();
  byId("list-view").hidden = Boolean(id);
  byId("run-view").hidden = !id;
  view = id ? new RunView(id) : null;
  document.title = "Trainmaster";
  complain("action");
  complain("poll");
  poll();
}

addEventListener("hashchange", () => {
  route();
  byId(view ? "run-title" : "list-title").focus();
  scrollTo(0, 0);
});
// a browser has six connections to a server: a tab that nobody sees keeps none
document.addEventListener("visibilitychange", () => (document.hidden ? view?.close() : poll()));
route();
