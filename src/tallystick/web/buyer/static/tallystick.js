// Everything works as plain links and forms without this file. With it, what arrives as a dialog is modal, closing
// gives the focus back, the welcome is remembered however it is closed, and a form is not sent twice by a double click.
"use strict";
(() => {
  const DOUBLE_CLICK_MS = 3000;
  let opener = null;
  let leaving = false;

  const remember = (form) =>
    fetch(form.action, {
      method: "POST",
      body: new URLSearchParams(new FormData(form)),
      headers: { "HX-Request": "true" },
      keepalive: true, // also when closing it was the last thing done here
    }).catch(() => {}); // then it is shown once more, which is all that failing costs

  const closed = (event) => {
    const dialog = event.target;
    const form = dialog.querySelector("form");
    const then = dialog.querySelector("a[data-ts-then]");
    if ("tsRemember" in dialog.dataset && form) remember(form);
    dialog.remove();
    if (then) {
      location.assign(then.href); // the page behind is out of date
    } else if (opener?.isConnected) {
      opener.focus();
    }
    opener = null;
  };

  const show = (dialog) => {
    if (document.querySelector("dialog[data-ts-modal=shown]")) return dialog.remove(); // asked for twice
    opener ??= document.activeElement;
    dialog.removeAttribute("open"); // close() would tell the listener below
    dialog.addEventListener("close", closed);
    dialog.dataset.tsModal = "shown";
    dialog.showModal();
  };

  const adopt = () => {
    for (const dialog of document.querySelectorAll('dialog[data-ts-modal=""]')) show(dialog);
    const shown = document.querySelector("dialog[data-ts-modal=shown]");
    if (shown && !shown.contains(document.activeElement)) shown.querySelector("[autofocus]")?.focus();
  };

  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-ts-close], [data-ts-then]");
    const dialog = link?.closest("dialog[data-ts-modal=shown]");
    if (!dialog || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    dialog.close();
  });

  document.addEventListener("submit", (event) => {
    const form = event.target;
    const dialog = form.closest("dialog[data-ts-remember]");
    if (dialog) {
      event.preventDefault();
      dialog.close();
    } else if (form.closest(".ts") && !form.matches("[hx-post]")) {
      // later, the buyer has stopped a slow request; the form's key makes both one purchase
      if (Date.now() - form.dataset.tsSent < DOUBLE_CLICK_MS) event.preventDefault();
      else form.dataset.tsSent = Date.now();
    }
  });

  // without an answer of ours, a link or form is used as without this file: then the browser says what is wrong
  const OURS = "form.ts-actions[hx-post], a.ts-button[hx-get]";
  const plainly = (from) => {
    if (leaving || !from.isConnected) return;
    if (from.href) location.assign(from.href);
    else from.submit();
  };
  document.addEventListener("htmx:error", (event) => {
    if (event.detail.ctx && event.target.matches(OURS)) plainly(event.target);
  });
  document.addEventListener("htmx:before:swap", (event) => {
    if (!event.target.matches?.(OURS) || event.detail.ctx.text.includes("<dialog")) return;
    event.preventDefault(); // a proxy's page
    plainly(event.target);
  });

  addEventListener("beforeunload", () => {
    leaving = true; // which ends requests
  });

  addEventListener("pageshow", (event) => {
    leaving = false;
    if (!event.persisted) return; // back from the next page: forms may be sent again, and the balance may have moved
    for (const form of document.querySelectorAll("form[data-ts-sent]")) delete form.dataset.tsSent;
    document.body.dispatchEvent(new CustomEvent("tallystick:balance"));
  });

  document.addEventListener("htmx:after:swap", adopt);
  adopt();
})();
