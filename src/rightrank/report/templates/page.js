// A button beside each command and each code, which copies it; without a clipboard it selects the text.
document.querySelectorAll("pre.command, pre.code").forEach((text) => {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.addEventListener("click", () => {
    const selected = () => { getSelection().selectAllChildren(text); return "Selected"; };
    const copied = navigator.clipboard ? navigator.clipboard.writeText(text.textContent).then(() => "Copied") : Promise.reject();
    copied.catch(selected).then((word) => { button.textContent = word; setTimeout(() => { button.textContent = "Copy"; }, 2000); });
  });
  text.before(button);
});

// A table's head sorts its rows: numbers by size, then text; a second click turns the order round.
document.querySelectorAll("table.sortable").forEach((table) => {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const text = (row) => row.cells[column].textContent.trim();
    const number = (row) => { const found = parseFloat(text(row).replace(/,/g, "")); return Number.isNaN(found) ? 1e300 : found; };
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down < 0 ? "descending" : "ascending");
      const order = (a, b) => down * (number(a) - number(b) || text(a).localeCompare(text(b)));
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    });
  });
});
