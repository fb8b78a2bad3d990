"use strict";
// The summary table: a click on a column's heading sorts by it. Without JavaScript it is a table like any other.

function sortBy(table, column, heading) {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const value = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // a run without the number is last either way
    return (x - y || (isNaN(x - y) ? x.localeCompare(y, "en", { numeric: true }) : 0)) * (ascending ? 1 : -1);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

function makeSortable(table) {
  for (const [column, heading] of [...table.tHead.rows[0].cells].entries()) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: heading.textContent });
    button.addEventListener("click", () => sortBy(table, column, heading));
    heading.replaceChildren(button);
  }
}

makeSortable(document.getElementById("summary"));
