"use strict";
// J and K move between cards. Where labels are judged, marks are kept in the browser and saved as a table.
const gallery = document.querySelector(".gallery");
const cards = Array.from(gallery.querySelectorAll(".card"));
const key = gallery.dataset.key;
const marks = new Map();

function go(step) {
  const at = cards.indexOf(document.activeElement.closest(".card"));
  const next = cards[Math.min(Math.max(at + step, 0), cards.length - 1)];
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
}

function read(card) {
  const chosen = card.querySelector("input:checked");
  if (!chosen) return;
  const wrong = chosen.value === "wrong";
  marks.set(card.dataset.uri, { mark: chosen.value, label: wrong ? card.querySelector("select").value : "" });
}

function keep() {
  const all = [...marks.values()];
  const wrong = all.filter(({ mark }) => mark === "wrong").length;
  document.getElementById("count").textContent = `${all.length} of ${cards.length} judged, ${wrong} wrong`;
  try {
    localStorage.setItem(key, JSON.stringify([...marks]));
  } catch { /* a browser that keeps nothing still saves the table */ }
}

function restore() {
  let kept = [];
  try {
    kept = JSON.parse(localStorage.getItem(key) ?? "[]");
  } catch { /* nothing was kept, or it is damaged */ }
  const cardOf = new Map(cards.map((card) => [card.dataset.uri, card]));
  for (const [uri, { mark, label }] of kept) {
    const card = cardOf.get(uri);
    if (!card) continue;
    const select = card.querySelector("select");
    const offered = [...select.options].some((option) => option.value === label);
    if (mark === "wrong" && !offered) continue; // the label was corrected since
    card.querySelector(`input[value=${mark === "wrong" ? "wrong" : "right"}]`).checked = true;
    if (label) select.value = label;
    read(card);
  }
  keep();
}

const quoted = (text) => `"${text.replaceAll('"', '""')}"`;

function table() {
  const wrong = [...marks].filter(([, { mark }]) => mark === "wrong");
  return ["uri,label", ...wrong.map(([uri, { label }]) => `${quoted(uri)},${quoted(label)}`)].join("\r\n") + "\r\n";
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const pressed = event.key.toLowerCase();
  const card = document.activeElement.closest(".card");
  if (pressed === "j" || pressed === "k") go(pressed === "j" ? 1 : -1);
  else if (key && card && (pressed === "r" || pressed === "w")) {
    card.querySelector(`input[value=${pressed === "r" ? "right" : "wrong"}]`).checked = true;
    read(card);
    keep();
  } else return;
  event.preventDefault();
});

if (key) {
  gallery.addEventListener("change", (event) => {
    const card = event.target.closest(".card");
    if (event.target.matches("select")) card.querySelector("input[value=wrong]").checked = true;
    read(card);
    keep();
  });
  document.getElementById("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([table()], { type: "text/csv" }));
    link.download = "corrections.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  restore();
}
