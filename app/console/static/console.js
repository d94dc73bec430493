"use strict";
// What HTML and htmx cannot do: one click is one request, a file that is too large is not sent, and a status that says
// what it said before is left alone.
(() => {
  const busy = (form, button) => {
    form.setAttribute("aria-busy", "true");
    if (button) button.classList.add("working");
  };
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.getAttribute("aria-busy") === "true") {
      event.preventDefault();
      return;
    }
    // An answer that is a file leaves the page as it is.
    if (event.submitter && event.submitter.value === "csv") return;
    busy(form, event.submitter);
  });
  const words = (node) => node.textContent.trim().replace(/\s+/g, " ");
  document.addEventListener("htmx:oobBeforeSwap", (event) => {
    const { target, fragment } = event.detail;
    // A screen reader would say it once more.
    if (target.getAttribute("role") === "status" && words(target) === words(fragment)) event.detail.shouldSwap = false;
  });
  window.addEventListener("pageshow", () => {
    for (const form of document.querySelectorAll("form[aria-busy]")) form.removeAttribute("aria-busy");
    for (const button of document.querySelectorAll(".working")) button.classList.remove("working");
  });
  document.addEventListener("change", (event) => {
    const input = event.target;
    if (!(input instanceof HTMLInputElement) || !input.dataset.max) return;
    const large = input.files.length > 0 && input.files[0].size > Number(input.dataset.max);
    const problem = document.getElementById(`${input.id}-problem`);
    if (problem) problem.hidden = !large;
    input.setCustomValidity(large ? "This file is too large." : "");
  });
})();
