// The page of `sdxl serve` at /: a prompt, a picture that comes into being, and what can be said about it. It is one file without parts,
// so that nothing has to be built or loaded, and asks the server's own routes as any program would.

export const page = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>sdxl</title>
<style>
  body { font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #222; background: #fafafa }
  form { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem }
  label { display: grid; font-size: .85rem; color: #555 }
  .wide { grid-column: 1 / -1 }
  textarea, input, button { font: inherit; padding: .4rem; border: 1px solid #bbb; border-radius: .3rem; background: #fff; color: inherit }
  button { cursor: pointer; align-self: end }
  progress { width: 100%; margin-top: 1rem }
  #told { min-height: 1.4em; color: #a00 }
  #pictures { display: flex; flex-wrap: wrap; gap: 1rem }
  figure { margin: 0 } figcaption { font-size: .85rem; color: #555 }
  img { max-width: 100%; border-radius: .3rem; min-width: 8rem }
  @media (prefers-color-scheme: dark) {
    body { background: #1b1b1b; color: #ddd } label, figcaption { color: #aaa }
    textarea, input, button { background: #2a2a2a; border-color: #555 } #told { color: #f88 }
  }
</style>
<form id="form">
  <label class="wide">Prompt <textarea name="prompt" rows="2" required autofocus></textarea></label>
  <label class="wide">Negative prompt <input name="negative_prompt"></label>
  <label>Width <input name="width" type="number" min="8" step="8"></label>
  <label>Height <input name="height" type="number" min="8" step="8"></label>
  <label>Steps <input name="num_inference_steps" type="number" min="1" max="150"></label>
  <label>Guidance scale <input name="guidance_scale" type="number" min="0" step="any"></label>
  <label>Seed <input name="seed" type="number" min="-1"></label>
  <label>Pictures <input name="n" type="number" min="1" max="16" value="1"></label>
  <label id="keyed" hidden>Key <input name="key" type="password" autocomplete="current-password"></label>
  <button id="draw">Draw</button>
  <button id="stop" type="button" hidden>Stop</button>
</form>
<progress id="progress" aria-label="How far it is" max="1" value="0" hidden></progress>
<p id="told" role="alert"></p>
<div id="pictures"></div>
<script>
  const at = (id) => document.getElementById(id);
  const form = at('form');
  const ask = (path, body) => fetch(path, {
    method: body ? 'POST' : 'GET',
    headers: {
      ...(body ? { 'Content-Type': 'application/json' } : {}),
      ...(form.elements.key.value ? { Authorization: 'Bearer ' + form.elements.key.value } : {}),
    },
    body: body && JSON.stringify(body),
  });
  const show = (png, prompt, caption) => {
    const figure = document.createElement('figure');
    const image = figure.appendChild(document.createElement('img'));
    image.alt = prompt;
    if (png) image.src = 'data:image/png;base64,' + png;
    figure.appendChild(document.createElement('figcaption')).textContent = caption;
    return figure;
  };
  function requestOf() {
    const { width, height, key, ...said } = Object.fromEntries(new FormData(form));
    const given = Object.entries(said).filter(([, value]) => value !== '');
    const numbers = given.map(([name, value]) => [name, form.elements[name].type === 'number' ? Number(value) : value]);
    return { ...Object.fromEntries(numbers), ...(width && height ? { size: width + 'x' + height } : {}) };
  }
  /** Until \`done\`: how far it is, and what there is to be seen. */
  async function watch(state, figure) {
    while (!state.done) {
      await new Promise((resolve) => setTimeout(resolve, 500));
      const { progress, current_image } = await (await ask('/sdapi/v1/progress')).json();
      if (state.done) return;
      at('progress').value = progress;
      if (current_image) figure.firstChild.src = 'data:image/png;base64,' + current_image;
    }
  }
  // A size is both sides or neither.
  const [width, height] = [form.elements.width, form.elements.height];
  for (const [one, other] of [[width, height], [height, width]])
    one.addEventListener('input', () => { other.required = one.value !== ''; });
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    const state = { done: false };
    const request = requestOf();
    const figure = show('', request.prompt, 'on its way');
    at('told').textContent = '';
    at('draw').disabled = true;
    at('stop').hidden = at('progress').hidden = false;
    at('progress').value = 0;
    at('pictures').prepend(figure);
    try {
      const asked = ask('/v1/images/generations', request);
      watch(state, figure).catch(() => {});
      const response = await asked;
      const answer = await response.json();
      if (response.status === 401) at('keyed').hidden = false;
      if (!response.ok) throw new Error(answer.error.message);
      for (const { b64_json, seed } of answer.data) at('pictures').prepend(show(b64_json, request.prompt, 'seed ' + seed));
    } catch (error) {
      at('told').textContent = error.message;
    }
    state.done = true;
    figure.remove();
    at('draw').disabled = false;
    at('stop').hidden = at('progress').hidden = true;
  });
  at('stop').addEventListener('click', () => ask('/sdapi/v1/interrupt', {}));
</script>
</html>
`;
