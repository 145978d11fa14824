// Filters the table by words and sorts it by a column; without this, it is a plain table.
const rows = [...document.querySelectorAll("tbody tr")], box = document.querySelector("#search");
const filter = () => {
  const words = box.value.toLowerCase().split(/\s+/);
  for (const row of rows) row.hidden = !words.every((word) => row.dataset.text.includes(word));
  document.querySelector("#count").textContent = `${rows.filter((row) => !row.hidden).length} features`;
};
document.querySelector(".search").hidden = false;
box.addEventListener("input", filter);
for (const head of document.querySelectorAll("th[data-sort]")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "descending" ? -1 : 1, at = head.cellIndex;
    for (const other of document.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up < 0 ? "descending" : "ascending");
    const value = (row) => row.cells[at].dataset.value ?? row.cells[at].textContent.toLowerCase();
    const number = (row) => (value(row) === "" ? NaN : Number(value(row)));
    rows.sort((a, b) => {
      const x = number(a), y = number(b);
      if (head.dataset.sort === "text") return -up * value(b).localeCompare(value(a));
      return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : up * (x - y);
    });
    document.querySelector("tbody").append(...rows);
  });
}
filter();
