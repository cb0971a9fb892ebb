// Select a prompt of the matrix and a step of the validation grids. Without scripts the first and the last are visible.
document.querySelectorAll("[data-chooses]").forEach((input) => {
  const items = Array.from(document.querySelectorAll(`[data-of="${input.dataset.chooses}"]`));
  const output = document.getElementById(`${input.id}-value`);
  const show = () => {
    items.forEach((item, i) => item.classList.toggle("hidden", i !== Number(input.value)));
    const chosen = items[Number(input.value)];
    if (output) output.textContent = chosen.dataset.name;
    input.setAttribute("aria-valuetext", chosen.dataset.name);
  };
  input.addEventListener("input", show);
  show();
});
// Sort a table by the column whose head is pressed; once more reverses the order.
document.querySelectorAll("table.sortable").forEach((table) => {
  const heads = Array.from(table.querySelectorAll("thead th")), body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const of = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const number = (text) => (text.trim() === "" || isNaN(text) ? null : Number(text));
      const compare = (a, b) => {
        const [x, y] = [number(of(a)), number(of(b))];
        return x !== null && y !== null ? x - y : of(a).localeCompare(of(b));
      };
      const rows = Array.from(body.rows).sort((a, b) => (down ? -compare(a, b) : compare(a, b)));
      body.append(...rows);
    });
  });
});
