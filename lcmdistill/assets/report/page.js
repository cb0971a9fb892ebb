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
