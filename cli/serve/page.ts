// The page of `sdxl serve` at /: a prompt, a picture that comes into being, and what can be said about it. It is one file without parts,
// so that nothing has to be built or loaded, and asks the server's own routes, beside wherever a proxy may show it. It heeds its own request alone, by
// OpenAI's stream, and stops it by leaving: A1111's progress and interrupt are of whatever is at work, which may be someone else's.
import { mostPartials } from './openai_api.ts';

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
  <label>Seed <input name="seed" type="number" min="-1" max="9007199254740991"></label>
  <label>Pictures <input name="n" type="number" min="1" max="16" value="1"></label>
  <label id="keyed" hidden>Key <input name="key" type="password" autocomplete="current-password"></label>
  <button id="draw" title="Ctrl+Enter">Draw</button>
  <button id="stop" type="button" title="Escape" hidden>Stop</button>
</form>
<progress id="progress" aria-label="How far it is" max="1" value="0" hidden></progress>
<p id="told" role="alert"></p>
<div id="pictures"></div>
<script>
  const at = (id) => document.getElementById(id);
  const form = at('form');
  const previews = ${mostPartials};
  const ask = (body, signal) => fetch('v1/images/generations', {
    method: 'POST',
    headers: {
      'Content-Type': 'application/json',
      ...(form.elements.key.value ? { Authorization: 'Bearer ' + form.elements.key.value } : {}),
    },
    body: JSON.stringify({ ...body, stream: true, partial_images: previews }),
    signal,
  });
  const show = (png, prompt, caption) => {
    const figure = document.createElement('figure');
    const image = figure.appendChild(document.createElement('img'));
    image.alt = prompt;
    if (png) image.src = 'data:image/png;base64,' + png;
    figure.appendChild(document.createElement('figcaption')).append(caption);
    return figure;
  };
  /** A seed, which draws again when it is chosen. */
  const seeded = (seed) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = 'seed ' + seed;
    button.title = 'Draw from this seed again';
    button.addEventListener('click', () => { form.elements.seed.value = seed; });
    return button;
  };
  function requestOf() {
    const { width, height, key, ...said } = Object.fromEntries(new FormData(form));
    const given = Object.entries(said).filter(([, value]) => value !== '');
    const numbers = given.map(([name, value]) => [name, form.elements[name].type === 'number' ? Number(value) : value]);
    return { ...Object.fromEntries(numbers), ...(width && height ? { size: width + 'x' + height } : {}) };
  }
  /** Hands over each event of a stream. */
  async function read(response, heed) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = '';
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const events = (rest + part.value).split('\\n\\n');
      rest = events.pop();
      for (const event of events) heed(JSON.parse(event.slice(event.indexOf('data: ') + 6)));
    }
  }
  // A size is both sides or neither.
  const [width, height] = [form.elements.width, form.elements.height];
  for (const [one, other] of [[width, height], [height, width]])
    one.addEventListener('input', () => { other.required = one.value !== ''; });
  let work; // what ends the request that is on its way
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    if (work) return;
    work = new AbortController();
    const request = requestOf();
    const figure = show('', request.prompt, 'on its way');
    at('told').textContent = '';
    at('stop').hidden = at('progress').hidden = false;
    at('progress').removeAttribute('value'); // others may be drawn before
    at('pictures').prepend(figure);
    try {
      const response = await ask(request, work.signal);
      if (response.status === 401) {
        at('keyed').hidden = false;
        form.elements.key.focus();
      }
      if (!response.ok) {
        const said = await response.json().catch(() => ({})); // a proxy speaks for itself
        throw new Error(said.error?.message ?? 'refused with ' + response.status + ' ' + response.statusText);
      }
      await read(response, ({ error, b64_json, seed, partial_image_index: i }) => {
        if (error) throw new Error(error.message);
        if (seed !== undefined) return figure.after(show(b64_json, request.prompt, seeded(seed)));
        figure.firstChild.src = 'data:image/png;base64,' + b64_json;
        at('progress').value = (i + 1) / (previews + 1);
      });
    } catch (error) {
      at('told').textContent = work.signal.aborted ? 'stopped' : error.message;
    }
    work = undefined;
    figure.remove();
    if (document.activeElement === at('stop')) at('draw').focus(); // which else would be lost
    at('stop').hidden = at('progress').hidden = true;
  });
  at('stop').addEventListener('click', () => work.abort());
  form.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    if (event.key === 'Escape') work?.abort();
  });
</script>
</html>
`;
