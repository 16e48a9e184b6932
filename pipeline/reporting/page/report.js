"use strict";
// The results table: click a column's button to sort; the search field and the menus filter.
const table = document.getElementById("results");
const body = table.tBodies[0];
const rows = Array.from(body.rows);
const words = document.getElementById("words");
const menus = Array.from(document.querySelectorAll("select[data-column]"));
const shown = document.getElementById("shown");

function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

function compare(a, b) {
  const missing = (a === "") - (b === ""); // unknown values stay last in both directions
  if (missing) return { missing };
  const numbers = [Number(a), Number(b)];
  return { order: numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1] };
}

function sort(header) {
  const column = header.cellIndex;
  const before = header.getAttribute("aria-sort");
  const first = header.dataset.first ?? (header.classList.contains("n") ? "descending" : "ascending");
  const direction = !before ? first : before === "ascending" ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  rows.sort((a, b) => {
    const { missing, order } = compare(value(a, column), value(b, column));
    return missing ?? sign * order;
  });
  body.append(...rows);
}

function filter() {
  const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    const chosen = menus.every((menu) => !menu.value || row.dataset[menu.dataset.column] === menu.value);
    row.hidden = !(chosen && wanted.every((word) => text.includes(word)));
    count += !row.hidden;
  }
  shown.textContent = `${count} of ${rows.length} shown`;
}

for (const header of table.tHead.rows[0].cells) {
  header.querySelector("button").addEventListener("click", () => sort(header));
}
words.addEventListener("input", filter);
for (const menu of menus) menu.addEventListener("change", filter);
filter();
