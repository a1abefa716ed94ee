// Tables of class "sortable" are sorted by a click on a heading: numbers first, what is empty last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const key = row => row.cells[column].dataset.sort;
      body.append(...[...body.rows].sort((one, two) => {
        const a = key(one), b = key(two);
        if (!a || !b) return !a - !b;
        const order = isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) || a.localeCompare(b) : a - b;
        return ascending ? order : -order;
      }));
    });
  });
}
