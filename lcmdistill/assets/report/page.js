// Choosing a prompt of the matrix and a step of the validation grids; without a script the first and the last are shown.
document.querySelectorAll("[data-chooses]").forEach((input) => {
  const items = Array.from(document.querySelectorAll(`[data-of="${input.dataset.chooses}"]`));
  const told = document.getElementById(`${input.id}-told`);
  const show = () => {
    items.forEach((item, i) => item.classList.toggle("hidden", i !== Number(input.value)));
    const chosen = items[Number(input.value)];
    if (told) told.textContent = chosen.dataset.name;
    input.setAttribute("aria-valuetext", chosen.dataset.name);
  };
  input.addEventListener("input", show);
  show();
});
