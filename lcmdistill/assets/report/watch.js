// Reload the page when the run has changed, unless a picture is enlarged.
setInterval(async () => {
  try {
    const version = await (await fetch("/version")).text();
    if (version !== document.body.dataset.version && !document.querySelector("dialog[open]")) location.reload();
  } catch {
    // The server has stopped; the page stays as it is.
  }
}, 3000);
