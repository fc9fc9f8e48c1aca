// Sorting: a click or Enter on a column's name sorts systems and reference rows, each among themselves.
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
// A link to a protocol opens it.
const reveal = () => {
  const target = document.querySelector(location.hash || "#none");
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", reveal);
reveal();
// On paper everything is open.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
// One video at a time.
addEventListener("play", (event) => {
  for (const video of document.querySelectorAll("video")) if (video !== event.target) video.pause();
}, true);
