// Sorting: a column's name sorts systems and reference rows, each among themselves.
for (const table of document.querySelectorAll("table.board")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, index) => {
    const button = header.querySelector(".sort");
    button.addEventListener("click", () => {
      const order = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const numeric = button.dataset.kind === "number";
      const key = (row) => row.cells[index].dataset.value ?? "";
      for (const body of table.tBodies) {
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === "" || y === "") return (x === "") - (y === ""); // what has no value stays last
          return sign * (numeric ? x - y : x.localeCompare(y));
        });
        body.append(...rows);
      }
    });
  });
}

// Filtering: every word must stand in the row's name or role.
for (const tools of document.querySelectorAll(".tools[data-table]")) {
  const rows = [...document.getElementById(tools.dataset.table).tBodies].flatMap((body) => [...body.rows]);
  const input = tools.querySelector(".filter");
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const name = row.querySelector("th").textContent.toLowerCase();
      row.hidden = !words.every((word) => name.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    tools.querySelector("[role=status]").textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
  };
  input.addEventListener("input", filter);
  filter();
}

// Hiding columns.
for (const menu of document.querySelectorAll(".menu")) {
  const boxes = [...menu.querySelectorAll("[data-column]")];
  const show = () => {
    for (const row of document.getElementById(menu.dataset.table).rows)
      for (const box of boxes) row.cells[box.dataset.column].hidden = !box.checked;
  };
  menu.addEventListener("change", show);
  menu.querySelector(".all").addEventListener("click", () => {
    for (const box of boxes) box.checked = true;
    show();
  });
  show(); // a reloaded page keeps its checks
}

// Comparing two rows sample by sample.
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
for (const card of document.querySelectorAll(".compare")) {
  const data = JSON.parse(card.querySelector("script").textContent);
  const field = (name) => card.querySelector(`[name=${name}]`);
  const [list, more, status] = [".pairs", ".more", "[role=status]"].map((name) => card.querySelector(name));
  const fill = (name, options, chosen) => {
    field(name).replaceChildren(...options.map(([text, value]) => new Option(text, value)));
    field(name).selectedIndex = chosen;
  };
  const names = data.rows.map((row, index) => [row.title, index]);
  fill("metric", data.metrics.map((metric, index) => [metric.title, index]), 0);
  fill("left", names, 0);
  fill("right", names, 1);
  let limit = 5;

  const media = (row, key) => {
    const original = document.getElementById(data.media[key]?.[row.name]);
    if (!original) return make("p", "sub", "no picture or video");
    const copy = original.cloneNode();
    copy.removeAttribute("id");
    return copy;
  };
  const draw = () => {
    const metric = data.metrics[field("metric").value];
    const rows = [data.rows[field("left").value], data.rows[field("right").value]];
    const scores = rows.map((row) => row.scores[metric.name]);
    const orders = rows.map((row) => `worst of ${row.title}`);
    rows.forEach((row, side) => orders.push(`where ${row.title} loses most to ${rows[1 - side].title}`));
    fill("order", orders.map((words, index) => [words, index]), Math.max(field("order").selectedIndex, 0));
    list.replaceChildren();
    more.hidden = true;
    if (!scores[0] || !scores[1]) {
      status.textContent = `${metric.title} has no values for both of these rows.`;
      return;
    }
    const bad = (value) => (metric.better ? -metric.better * value : Math.abs(value));
    const [order, side] = [Number(field("order").value), Number(field("order").value) % 2];
    const rank = (at) => bad(scores[side][at]) - (order > 1 ? bad(scores[1 - side][at]) : 0);
    const found = data.keys.map((key, at) => at).filter((at) => !field("only")?.checked || data.media[data.keys[at]]);
    found.sort((a, b) => rank(b) - rank(a));
    const text = (value) => `${value.toFixed(metric.decimals)} ${metric.unit}`.trim();
    const largest = Math.max(...scores.flat().map(Math.abs)) || 1;
    const shown = found.slice(0, limit);
    status.textContent = `${shown.length} of ${data.keys.length}, ${metric.title.toLowerCase()}`;
    const pictures = shown.some((at) => data.media[data.keys[at]]);
    for (const at of shown) {
      const item = make("li");
      const head = make("p", "key", data.keys[at]);
      const difference = scores[0][at] - scores[1][at];
      head.append(make("span", "sub", `difference ${difference > 0 ? "+" : ""}${text(difference)}`));
      const sides = make("div", "sides");
      rows.forEach((row, index) => {
        const box = make("div", "side");
        if (pictures && data.media[data.keys[at]]) box.append(media(row, data.keys[at]));
        const value = make("p", "score");
        value.append(make("span", "", row.title), make("span", "num", text(scores[index][at])));
        const bar = make("i", index ? "bar right" : "bar left");
        bar.style.width = `${(100 * Math.abs(scores[index][at])) / largest}%`;
        const track = make("span", "track");
        track.append(bar);
        box.append(value, track);
        sides.append(box);
      });
      item.append(head, sides);
      list.append(item);
    }
    more.hidden = found.length <= limit;
  };
  card.addEventListener("change", () => {
    limit = 5;
    draw();
  });
  more.addEventListener("click", () => {
    limit += 20;
    draw();
  });
  draw();
}

// A link to a protocol opens it, and leaves the popover it stands in.
const reveal = (hash) => {
  const target = document.getElementById(hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
reveal(location.hash);
addEventListener("click", (event) => {
  const link = event.target.closest?.('a[href^="#"]');
  if (!link) return;
  link.closest(".popover")?.hidePopover();
  reveal(link.hash);
});
// On paper everything is open.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
// One video at a time.
addEventListener("play", (event) => {
  for (const video of document.querySelectorAll("video")) if (video !== event.target) video.pause();
}, true);
