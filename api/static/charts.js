/* Curves and how they are drawn. A value that is no finite number leaves a gap. */

export class Curve {
  steps = [];
  values = [];

  static from(points) {
    const curve = new Curve();
    curve.steps = points.step;
    curve.values = points.value.map(finite);
    return curve;
  }

  /* A step that came before is replaced: a resumed run logs some steps again. */
  put(step, value) {
    const { steps, values } = this;
    let at = steps.length;
    while (at > 0 && steps[at - 1] >= step) at--;
    values.splice(at, steps[at] === step ? 1 : 0, finite(value));
    steps.splice(at, steps[at] === step ? 1 : 0, step);
  }

  get last() {
    return this.values.at(-1);
  }

  /* Exponential moving average, free of the pull towards zero at the start. */
  smoothed(weight) {
    let sum = 0;
    let share = 0;
    return this.values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      share = weight * share + (1 - weight);
      return sum / share;
    });
  }
}

const finite = (value) => (Number.isFinite(value) ? value : null);

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

const plain = (value) =>
  value === 0 || (Math.abs(value) >= 0.01 && Math.abs(value) < 1e4)
    ? String(+value.toPrecision(4))
    : Math.abs(value) >= 1e4
      ? compact.format(value)
      : value.toExponential(1);

/* One plot in a container: it takes the container's width, and the colours of the theme. */
export class Chart {
  constructor(container, { height, series, legend = false }) {
    Object.assign(this, { container, height, series, legend, log: false, data: null, plot: null });
    new ResizeObserver(() => {
      const width = container.clientWidth;
      if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: this.plotHeight });
    }).observe(container);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.build());
  }

  get plotHeight() {
    return this.container.clientWidth < 500 ? Math.min(this.height, 240) : this.height;
  }

  setLog(log) {
    this.log = log;
    this.build();
  }

  show(data) {
    this.data = data;
    if (this.plot) {
      this.plot.setData(data, this.plot.zoomed !== true);
      if (this.plot.zoomed) this.plot.redraw(); // data set without new scales is not drawn
    } else this.build();
    this.showNewest();
  }

  /* In the legend, while nobody points at a step. */
  showNewest() {
    if (this.plot && this.data[0].length && this.plot.cursor.idx == null) this.plot.setLegend({ idx: this.data[0].length - 1 });
  }

  clear() {
    this.plot?.destroy();
    this.plot = this.data = null;
  }

  build() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.data || !this.container.clientWidth) return;
    const axis = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false } };
    const options = {
      width: this.container.clientWidth,
      height: this.plotHeight,
      padding: [12, 12, 0, 0],
      legend: { show: this.legend },
      cursor: { points: { size: 7 }, drag: { x: true, y: false } },
      hooks: { setSelect: [(plot) => (plot.zoomed = true)], setCursor: [() => this.showNewest()] },
      scales: { x: { time: false }, y: this.log ? { distr: 3, range: aroundLog } : { range: around } },
      axes: [
        { ...axis, space: 60, size: 28, values: (_, ticks) => ticks.map((tick) => (tick % 1 ? "" : compact.format(tick))) },
        { ...axis, size: 56, values: (_, ticks) => ticks.map(plain), ...(this.log && { splits: logTicks, filter: all }) },
      ],
      series: [
        { label: "step", value: (_, step) => (step == null ? "–" : step.toLocaleString("en")) },
        ...this.series.map((one) => ({
          ...one,
          stroke: color(one.color) + (one.faint ? "77" : ""),
          width: one.faint ? 1 : 2,
          points: { show: one.dots || isOnePoint, size: 6, fill: color(one.color) },
          value: (_, value) => (value == null ? "–" : plain(value)),
        })),
      ],
    };
    this.plot = new uPlot(options, this.data, this.container);
    this.plot.over.addEventListener("dblclick", () => (this.plot.zoomed = false));
  }
}

/* No line shows that. */
const isOnePoint = (plot, at) => plot.data[at].filter((value) => value != null).length === 1;

const all = (_, ticks) => ticks;

function around(_, min, max) {
  if (min === null) return [0, 1];
  const room = 0.06 * (max - min) || 0.1 * Math.abs(max) || 1;
  return [min - room, max + room];
}

function aroundLog(_, min, max) {
  if (min === null) return [0.1, 1];
  const room = Math.max((max / min) ** 0.06, 1.02);
  return [min / room, max * room];
}

/* Round numbers, at most eight, evenly spread for the eye. */
function logTicks(_, __, min, max) {
  for (const digits of [[1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9], [1, 1.5, 2, 3, 4, 6, 8], [1, 2, 5], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(min)); power <= Math.log10(max); power++)
      for (const digit of digits) ticks.push(+(digit * 10 ** power).toPrecision(2));
    const inside = ticks.filter((tick) => tick >= min && tick <= max);
    if (inside.length <= 8) return inside;
  }
  return [min, max];
}

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 96;
const HEIGHT = 26;

/* A curve of a few dozen points, without axes. */
export function drawSparkline(svg, curve) {
  const points = curve.steps.map((step, at) => [step, curve.values[at]]).filter(([, value]) => value !== null);
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  if (points.length < 2) return svg.replaceChildren();
  const values = points.map(([, value]) => value);
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const [min, max] = [Math.min(...values), Math.max(...values)];
  const line = document.createElementNS(SVG, "polyline");
  const at = ([step, value]) =>
    `${((step - first) / (last - first)) * (WIDTH - 4) + 2},${HEIGHT - 3 - ((value - min) / (max - min || 1)) * (HEIGHT - 6)}`;
  line.setAttribute("points", points.map(at).join(" "));
  svg.replaceChildren(line);
}
