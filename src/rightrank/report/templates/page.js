// Add a copy button to each command and code block. Without a clipboard, it selects the text.
document.querySelectorAll("pre.command, pre.code").forEach((text) => {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.addEventListener("click", () => {
    const selectText = () => { getSelection().selectAllChildren(text); return "Selected"; };
    const copying = navigator.clipboard ? navigator.clipboard.writeText(text.textContent).then(() => "Copied") : Promise.reject();
    copying.catch(selectText).then((message) => { button.textContent = message; setTimeout(() => { button.textContent = "Copy"; }, 2000); });
  });
  text.before(button);
});

// Sort a table's rows by a click on a column heading: numbers by size, then text. A second click reverses the order.
document.querySelectorAll("table.sortable").forEach((table) => {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const text = (row) => row.cells[column].textContent.trim();
    const number = (row) => { const value = parseFloat(text(row).replace(/,/g, "")); return Number.isNaN(value) ? 1e300 : value; };
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      table.querySelectorAll("[aria-sort]").forEach((cell) => cell.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
      const compare = (a, b) => sign * (number(a) - number(b) || text(a).localeCompare(text(b)));
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
});
