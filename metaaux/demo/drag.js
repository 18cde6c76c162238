// Turning the head by dragging its picture: moves the sliders, which render the view.
() => {
  const DEGREES_PER_WIDTH = 70;
  let drag = null;
  const range = (id) => document.querySelector(`#${id} input[type=range]`);
  const move = (input, value) => {
    value = Math.min(Math.max(value, Number(input.min)), Number(input.max));
    value = Math.round(value / Number(input.step)) * Number(input.step);
    if (value === Number(input.value)) return;
    input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  document.addEventListener("pointerdown", (event) => {
    const picture = event.target.closest("#view img");
    const yaw = range("yaw"), pitch = range("pitch");
    if (!picture || !yaw || !pitch || event.button !== 0) return;
    event.preventDefault();
    drag = { x: event.clientX, y: event.clientY, yaw: Number(yaw.value), pitch: Number(pitch.value),
             width: picture.clientWidth, touch: event.pointerType === "touch" };
    document.body.classList.add("turning");
  });
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const scale = DEGREES_PER_WIDTH / drag.width;
    move(range("yaw"), drag.yaw + (event.clientX - drag.x) * scale);
    // A finger that moves up or down scrolls the page.
    if (!drag.touch) move(range("pitch"), drag.pitch + (event.clientY - drag.y) * scale);
  });
  for (const name of ["pointerup", "pointercancel"])
    document.addEventListener(name, () => {
      drag = null;
      document.body.classList.remove("turning");
    });
}
