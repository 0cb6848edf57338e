// Charts from what the page holds already, and progress without reloading. Every page says the same without it.
"use strict";

// A token as a colour that a canvas understands: light-dark() is resolved by asking an element.
function colour(token) {
  const probe = document.createElement("span");
  probe.style.color = `var(${token})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const axis = (more) => ({
  stroke: () => colour("--ts-muted"),
  font: "12px system-ui, sans-serif",
  grid: { stroke: () => colour("--ts-line"), width: 1 },
  ticks: { show: false },
  ...more,
});

const whole = (u, value) => (value == null ? "–" : value.toLocaleString("en"));
const wholeTicks = (u, values) => values.map((value) => (Number.isInteger(value) ? value.toLocaleString("en") : ""));

const HOUR = 3600, DAY = 24 * HOUR;
const drawn = [];

function chart(figure, options, data) {
  figure.hidden = false;
  const size = () => ({ width: figure.clientWidth, height: figure.clientWidth < 600 ? 200 : 240 });
  const plot = new uPlot(
    { ...size(), tzDate: (at) => uPlot.tzDate(new Date(at * 1e3), "Etc/UTC"), legend: { live: true }, ...options },
    data,
    figure,
  );
  drawn.push({ plot, size });
}

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const dates = (u, ticks, axis, space, step) => ticks.map((at) => {
  const moment = new Date(at * 1e3);
  return step < DAY ? moment.toISOString().slice(11, 16) : `${moment.getUTCDate()} ${MONTHS[moment.getUTCMonth()]}`;
});

function bars(figure) {
  const rows = [...document.querySelectorAll(`#${figure.dataset.bars} tr[data-at]`)].reverse();
  if (!rows.length) return;
  const column = (name) => rows.map((row) => Number(row.dataset[name]));
  chart(
    figure,
    {
      cursor: { y: false, points: { show: false } },
      scales: {
        x: { range: (u, first, last) => [first - DAY / 2, last + DAY / 2] },
        y: { range: (u, low, high) => [Math.min(low, 0) * 1.05, Math.max(high, 1) * 1.05] }, // below 0: given back
      },
      axes: [axis({ grid: { show: false }, values: dates }), axis({ values: wholeTicks, size: 64 })],
      series: [
        { label: "Day", value: (u, at) => (at == null ? "–" : new Date(at * 1e3).toISOString().slice(0, 10)) },
        { label: "Sold", value: whole, fill: () => colour("--ts-hazel"), stroke: () => colour("--ts-hazel"), width: 1,
          paths: uPlot.paths.bars({ size: [0.36, 24], align: -1 }), points: { show: false } },
        { label: "Consumed", value: whole, stroke: () => colour("--ts-ink"), width: 1,
          paths: uPlot.paths.bars({ size: [0.36, 24], align: 1 }), points: { show: false } },
      ],
    },
    [rows.map((row) => Date.parse(row.dataset.at) / 1e3), column("sold"), column("consumed")],
  );
}

// What the server says at an address: null where it refuses, undefined where it is gone or the page is being left.
async function ask(address) {
  try {
    const answer = await fetch(address, { credentials: "same-origin" });
    return answer.ok ? await answer.json() : null;
  } catch {
    return undefined;
  }
}

async function steps(figure) {
  const found = await ask(figure.dataset.steps);
  if (!found) return;
  const { at, balance } = found;
  at.push(Math.max(Math.floor(Date.now() / 1e3), at.at(-1)));  // it still stands
  balance.push(balance.at(-1));
  chart(
    figure,
    {
      cursor: { y: false },
      scales: {
        x: { range: (u, first, last) => [Math.min(first, last - HOUR), last] },
        y: { range: (u, low, high) => [Math.min(0, low), Math.max(1, high) * 1.05] },
      },
      axes: [axis({ values: dates }), axis({ values: wholeTicks })],
      series: [
        { label: "When (UTC)",
          value: (u, at) => (at == null ? "–" : new Date(at * 1e3).toISOString().slice(0, 16).replace("T", " ")) },
        { label: "Balance", value: whole, stroke: () => colour("--ts-ink"), width: 1.5,
          paths: uPlot.paths.stepped({ align: 1 }), points: { show: at.length < 60, size: 4 } },
      ],
    },
    [at, balance],
  );
}

// Until when the page stays as it is: its reader presses something, or has followed a link that is still loading.
let stays = 0;
addEventListener("pointerdown", () => { stays = Infinity; });
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => { stays = Date.now() + 300; });
addEventListener("beforeunload", () => { stays = Date.now() + 10_000; });

function reload() {
  if (Date.now() < stays) setTimeout(reload, 100);
  else location.reload(); // not replace: to an address with a fragment it only scrolls
}

async function watch(bar) {
  for (;;) {
    await new Promise((done) => setTimeout(done, 500));
    const state = await ask(bar.dataset.watch);
    if (state === undefined) continue;
    if (!state?.running) return reload();
    if (state.percent != null) {
      bar.value = state.percent;
      for (const text of document.querySelectorAll("[data-percent]")) text.textContent = `${state.percent} %`;
    }
  }
}

document.querySelector(".top nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
document.querySelectorAll("[data-bars]").forEach(bars);
document.querySelectorAll("[data-steps]").forEach(steps);
document.querySelectorAll("progress[data-watch]").forEach(watch);
if (document.querySelector("progress[data-reload]")) setTimeout(reload, 1000);

let resizing;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => drawn.forEach(({ plot, size }) => plot.setSize(size())), 100);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(({ plot }) => plot.redraw()));

// One submission for a double click, which the server performs once in any case; later, a slow one was stopped.
addEventListener("submit", (event) => {
  if (event.target.method !== "post") return;
  if (Date.now() - event.target.dataset.sent < 3000) event.preventDefault();
  else event.target.dataset.sent = Date.now();
});
addEventListener("pageshow", () => document.querySelectorAll("form[data-sent]").forEach((form) => delete form.dataset.sent));
