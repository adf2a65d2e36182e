"use strict";
const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));
const search = document.getElementById("search");
const troubled = document.getElementById("troubled");

function filter() {
  const text = search.value.trim().toLowerCase();
  for (const row of all("[data-engine]")) {
    const wanted = row.dataset.engine.toLowerCase().includes(text) && !(troubled.checked && row.dataset.smooth === "1");
    row.hidden = !wanted;
  }
  for (const run of all("section")) {
    const rows = all(".row[data-engine]", run);
    const shown = rows.filter((row) => !row.hidden).length;
    run.querySelector(".shown").textContent = shown === rows.length ? "" : `${shown} of ${rows.length} engines are shown`;
  }
}

function sort(header) {
  const table = header.closest("table");
  const column = header.cellIndex;
  const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of all("th", table)) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  const numeric = header.classList.contains("n");
  const words = new Intl.Collator(undefined, { numeric: true });
  const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows).map((row) => [value(row), row]);
  rows.sort(([a], [b]) => {
    if (numeric && (a === "" || b === "")) return (a === "") - (b === ""); // what has no value comes last
    return sign * (numeric ? a - b : words.compare(a, b));
  });
  body.append(...rows.map(([, row]) => row));
}

function zoom(button) {
  const timeline = button.closest("section").querySelector(".timeline");
  const before = timeline.scrollLeft / timeline.scrollWidth;
  timeline.dataset.zoom = button.value;
  timeline.style.setProperty("--zoom", button.value);
  timeline.scrollLeft = before * timeline.scrollWidth;
  for (const other of all("button", button.parentElement)) other.setAttribute("aria-pressed", String(other === button));
}

search.addEventListener("input", filter);
troubled.addEventListener("change", filter);
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button === null) return;
  if (button.closest(".zoom")) zoom(button);
  else if (button.closest("th")) sort(button.closest("th"));
});
filter();
document.documentElement.dataset.scripted = "yes";
