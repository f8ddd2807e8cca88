// `sdxl serve`: a model that stays loaded and draws for other programs, by HTTP in OpenAI's words (serve/openai_api.ts) and A1111's
// (serve/a1111_api.ts), and for people by a page. Flags are those of `sdxl sample`, and stand where a request says nothing, so that a seed
// gives the picture that `sdxl sample` gives. One process answers, another draws (serve/drawer.ts).
import type { Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Command } from 'commander';
import { UserError } from '../io/errors.ts';
import { readLines } from '../io/files.ts';
import { below } from './help.ts';
import { shippedModel } from './model.ts';
import { number, repeated } from './option_values.ts';
import {
  modelOptions,
  refinerOptions,
  schedulersHelp,
  sizeOptions,
  stepOptions,
  textOptions,
} from './sample/flags.ts';
import { refuseHalfDone } from './sample/idle_flags.ts';
import { checkSample, type SampleOptions } from './sample/options.ts';
import { checkLook, lookOptions } from './sample/preview.ts';
import { addUpscaleOptions } from './sample/upscale_options.ts';
import { a1111Api } from './serve/a1111_api.ts';
import { type Drawer, openDrawer } from './serve/drawer_process.ts';
import { isLoopback } from './serve/guard.ts';
import { httpServer, Refusal, type Routes } from './serve/http.ts';
import { type ModelTold, nothingFollowed, type Settings, type Standing } from './serve/messages.ts';
import { openaiApi } from './serve/openai_api.ts';
import { page } from './serve/page.ts';
import { leaving, openQueue, type Queue } from './serve/queue.ts';
import { type Served, servedOf } from './serve/served.ts';
import { heedingSignals, inOneLine, Stopped, type Terminal } from './terminal.ts';

interface ServeOptions extends SampleOptions {
  listenIp: string;
  listenPort: number;
  apiKeyFile?: string;
  cors?: string[];
  queue: number;
  keepAlive?: number;
}

const examples = `
Examples:
  sdxl serve
  sdxl serve --model stabilityai/stable-diffusion-xl-base-1.0 --vae madebyollin/sdxl-vae-fp16-fix --lora style.safetensors
  sdxl serve --model ./sdxl-base --lora-model-dir ./loras --steps 30 --scheduler "DPM++ 2M Karras" --keep-alive 5
  sdxl serve --model ./sdxl-base --listen-ip 0.0.0.0 --api-key-file key.txt

  curl localhost:7860/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "a red fox", "seed": 1}'
  curl localhost:7860/sdapi/v1/txt2img -H 'Content-Type: application/json' -d '{"prompt": "a (red:1.2) fox", "steps": 25}'

${schedulersHelp}

Routes: / (a page), /v1/images/generations, /v1/images/edits, /v1/models, /sdapi/v1/txt2img, img2img, extra-single-image,
extra-batch-images, progress, interrupt, png-info, options, samplers, schedulers, sd-models, loras, refresh-loras, upscalers,
/controlnet/model_list, /controlnet/detect, and /healthz. docs/serve.md tells what they take.`;

/** What is put beside the UNet where a request says so. */
const followedOptions = (command: Command): Command =>
  command
    .option(
      '--controlnet <DIR|FILE|HUB_ID>',
      "a ControlNet or a union that A1111's clients may have followed, by the name of its folder or file; may be given more than once",
      repeated((text) => text),
    )
    .option(
      '--adapter <DIR|FILE|HUB_ID>',
      'the same of a T2I-Adapter',
      repeated((text) => text),
    )
    .option(
      '--ip-adapter <FILE|DIR|HUB_ID/FILE>',
      'the same of an IP-Adapter',
      repeated((text) => text),
    );

/** Who reaches the server, and what it does for how many of them. */
const serverOptions = (command: Command): Command =>
  command
    .optionsGroup('Server:')
    .option('--listen-ip <ADDRESS>', 'who reaches it: 0.0.0.0 is everyone, with a key', '127.0.0.1')
    .option(
      '--listen-port <N>',
      '0 takes a free one',
      number('--listen-port', { min: 0, max: 65535, whole: true }),
      7860,
    )
    .option(
      '--api-key-file <FILE>',
      'a file with the key that requests have to bring, as Authorization: Bearer KEY or as the password of Basic',
    )
    .option(
      '--cors <ORIGIN>',
      'let the pages of this origin ask, such as https://example.org; may be given more than once',
      repeated(originOf),
    )
    .option(
      '--queue <N>',
      'how many requests may wait',
      number('--queue', { min: 1, max: 10000, whole: true }),
      16,
    )
    .option(
      '--keep-alive <MINUTES>',
      'free all memory when nobody has asked for so long, and load the model again for the next request (default: keep it)',
      number('--keep-alive', { min: 0 }),
    )
    .option('--json', 'one JSON object on stdout when it is ready: url, model, device, dtype')
    .option('--quiet', 'no line for each request');

export function addServe(command: Command, terminal: Terminal): void {
  followedOptions(modelOptions(command));
  addUpscaleOptions(command);
  sizeOptions(textOptions(command.optionsGroup('Pictures, where a request says nothing:')));
  stepOptions(command);
  refinerOptions(command);
  lookOptions(command.optionsGroup('Preview (while a picture is drawn, for clients that ask):'), 'proj');
  serverOptions(command)
    .addHelpText('after', below(examples))
    .action((options: ServeOptions) => serve(options, command, terminal));
}

/** As browsers write it: another way, such as with a slash at its end, would let nobody in. @throws UserError */
function originOf(text: string): string {
  if (URL.canParse(text) && new URL(text).origin === text) return text;
  throw new UserError(`--cors takes an origin such as https://example.org, without a path, not "${text}"`);
}

async function serve(options: ServeOptions, command: Command, terminal: Terminal): Promise<void> {
  const key = keyOf(options);
  const standing = standingOf(options, command);
  const log = (line: string): void => {
    if (!options.quiet) terminal.err(`${new Date().toTimeString().slice(0, 8)} ${inOneLine(line)}\n`);
  };
  const leave = new AbortController(); // for the signal that is its reason
  const left = new Promise<void>((resolve) => {
    leave.signal.addEventListener('abort', () => resolve());
  });
  const drawer = drawerOf(standing, options, leave.signal, terminal);
  const queue = logged(openQueue(drawer, options.queue), log);
  const served = servedOf(standing, textsTyped(standing, command), log);
  const server = httpServer(routesOf(served, drawer, queue, leave.signal), {
    ...{ key, origins: options.cors ?? [], keyless: ['GET /healthz', 'GET /'] },
    onBug: (error) => terminal.err(`${(error as Error).stack}\n`),
  });
  await heedingSignals(
    (signal) => leave.abort(signal),
    async () => {
      try {
        const url = await listening(server, options.listenIp, options.listenPort);
        const told = await Promise.race([drawer.open(), left]);
        if (told) {
          tellReady({ url, model: served.name, ...told }, options, terminal);
          await left;
        }
        if (queue.working()) terminal.err('finishing the request at work; Ctrl-C again leaves at once\n');
        await queue.close();
      } finally {
        drawer.close();
        await closed(server);
      }
    },
  );
  if (leave.signal.aborted) throw new Stopped(leave.signal.reason);
}

/** The key that requests have to bring, if any. @throws UserError where everyone could draw */
function keyOf({ apiKeyFile, listenIp }: ServeOptions): string | undefined {
  const key = apiKeyFile === undefined ? undefined : keyIn(apiKeyFile);
  if (key || isLoopback(listenIp)) return key;
  throw new UserError(
    `--listen-ip ${listenIp} is reached from other machines: give --api-key-file, so that not everyone may draw`,
  );
}

/** What draws; it is started again where it ends by itself, until `left`. */
function drawerOf(
  standing: Standing,
  { keepAlive }: ServeOptions,
  left: AbortSignal,
  terminal: Terminal,
): Drawer {
  const drawer: Drawer = openDrawer(standing, {
    idleMs: keepAlive === undefined ? undefined : keepAlive * 60_000,
    tell: terminal.err,
    onLost: () => {
      if (left.aborted) return; // nobody is to be drawn for any more
      terminal.err('warning: the process that draws has ended; it is started again\n');
      drawer.open().catch((error) => terminal.err(`error: ${error.message}\n`));
    },
  });
  return drawer;
}

const routesOf = (served: Served, drawer: Drawer, queue: Queue, left: AbortSignal): Routes => ({
  'GET /': () => ({ html: page }),
  'GET /healthz': () => health(drawer, queue, left),
  ...openaiApi(served, queue),
  ...a1111Api(served, queue),
});

interface Ready extends ModelTold {
  url: string;
  model: string;
}

function tellReady({ url, model, device, dtype }: Ready, { json }: ServeOptions, terminal: Terminal): void {
  if (json) terminal.out(`${JSON.stringify({ url, model, device, dtype })}\n`);
  else terminal.err(`${model}, ${dtype} on ${device}, at ${url} (Ctrl-C ends it)\n`);
}

const isTyped = (command: Command, name: string): boolean => command.getOptionValueSource(name) === 'cli';

/** How prompts are read, where that was typed: A1111's habits are others. */
const textsTyped = ({ emphasis, maxTokenLength }: Standing, command: Command): Settings => ({
  ...(isTyped(command, 'emphasis') ? { emphasis } : {}),
  ...(isTyped(command, 'maxTokenLength') ? { maxTokenLength } : {}),
});

/** The options that hold for every request. @throws UserError for flags that contradict each other */
function standingOf(
  { apiKeyFile, cors, queue, keepAlive, listenIp, listenPort, ...given }: ServeOptions,
  command: Command,
): Standing {
  const standing = {
    ...given,
    model: given.model ?? shippedModel,
    // The latents of the model that comes along are none of SDXL's, whose colours proj shows.
    preview: given.model || isTyped(command, 'preview') ? given.preview : ('vae' as const),
    numImages: 1,
    batchCount: 1,
    output: 'out.png',
  };
  checkSample({ ...standing, ...nothingFollowed, prompt: [''] }); // a request has their pictures
  refuseHalfDone(standing);
  checkLook(standing);
  return standing;
}

/** @throws UserError */
function keyIn(file: string): string {
  const [key = '', ...more] = readLines(file);
  if (key.length >= 8 && more.length === 0 && !/\s/.test(key)) return key;
  throw new UserError(
    `--api-key-file ${file} takes one line of 8 letters or more; openssl rand -hex 16 makes one`,
  );
}

function logged(queue: Queue, log: (line: string) => void): Queue {
  return {
    ...queue,
    async draw(order, signal, watch) {
      const asked = performance.now();
      let began = asked;
      const begin = (): void => {
        began = performance.now();
      };
      try {
        const drawn = await queue.draw(order, signal, { ...watch, begin });
        const [took, waited] = [performance.now() - began, began - asked].map((ms) => (ms / 1000).toFixed(1));
        const seconds = `${took} s${waited === '0.0' ? '' : ` after waiting ${waited} s`}`;
        const from = `from ${drawn.map(({ seed }) => `seed ${seed}`).join(', ')}`;
        log(`${drawn.length} ${order.remade ? `made in ${seconds}` : `drawn in ${seconds}, ${from}`}`);
        return drawn;
      } catch (error) {
        log(`not drawn: ${(error as Error).message}`);
        throw error;
      }
    },
  };
}

/** @throws Refusal while nothing could be drawn */
function health(drawer: Drawer, queue: Queue, left: AbortSignal) {
  if (left.aborted) throw leaving();
  const state = drawer.state();
  if (state === 'opening') throw new Refusal(503, 'the model is being loaded');
  if (state === 'lost')
    throw new Refusal(503, 'the process that draws has ended and could not be started again');
  return { json: { status: 'ok', state, waiting: queue.waiting() } };
}

/** Once what is being answered is, or in five seconds where nobody reads it. */
function closed(server: Server): Promise<void> {
  const patience = setTimeout(() => server.closeAllConnections(), 5000);
  return new Promise((resolve) => {
    server.close(() => {
      clearTimeout(patience);
      resolve();
    });
  });
}

/** Its address, once it listens. @throws UserError */
function listening(server: Server, host: string, port: number): Promise<string> {
  return new Promise((resolve, reject) => {
    server.once('error', (error: NodeJS.ErrnoException) =>
      reject(
        error.code === 'EADDRINUSE'
          ? new UserError(`port ${port} of ${host} is taken by another program; give another --listen-port`)
          : new UserError(
              `${host}:${port} cannot be listened on (${error.message}); give another --listen-ip or --listen-port`,
            ),
      ),
    );
    server.listen(port, host, () => {
      const { address, port: taken, family } = server.address() as AddressInfo;
      resolve(`http://${family === 'IPv6' ? `[${address}]` : address}:${taken}`);
    });
  });
}
