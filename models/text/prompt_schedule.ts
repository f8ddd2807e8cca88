// Prompts that change while a picture is drawn, as AUTOMATIC1111's webui reads them (its prompt_parser.py): `[from:to:when]`, `[to:when]`,
// `[from::when]`, and `[a|b]`, of which each call of the network sees the next. Inside brackets stands what is itself well formed. A
// bracket or colon that belongs to nothing is text; but a `|` outside of brackets, or a last backslash, makes all of a prompt text.
// Brackets that are weights stay as they are, for emphasis.ts. (Of a stray bracket right behind nested ones, as in `([a:b:1])]`, A1111's
// parser makes text of all three.)
import type { Prompts } from './conditioning.ts';

/** A pass over a picture. A number in a prompt with a point is a share of its calls, one without is a call. */
export interface Pass {
  /** Calls of the network, as many as steps times the sampler's order. */
  calls: number;
  /** In a second pass, the calls of the first: from there numbers count on, and shares from 1. */
  before?: number;
}

/** A part of a prompt, as it is up to an end. */
type Part = (end: number) => string;

interface Read {
  part: Part;
  /** Where the prompt goes on. */
  next: number;
}

/** A prompt while it is read. */
interface Reading extends Pass {
  prompt: string;
  ends: Set<number>;
  /** What begins at a place with a bracket, which is asked for again where it is in one that is never closed. */
  known: Map<number, Read | undefined>;
}

const plain = /(?:[^\\[\]():|]+|\\[^\n])+/y;
const when = /:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*\]/iy;

/** The most brackets within each other; those further in are text. */
const mostDeep = 100;

/** The prompts of a pass that differ, and which of them each call is told. */
export interface Scheduled {
  prompts: readonly Prompts[];
  at: readonly number[];
}

const texts = ['prompt', 'prompt_2', 'negative_prompt', 'negative_prompt_2'] as const;

/** A request's prompts in calls of a pass. Where weights are not read, brackets are text. */
export function scheduled(prompts: Prompts, pass: Pass, calls: readonly number[]): Scheduled {
  if ((prompts.emphasis ?? 'none') === 'none') return { prompts: [prompts], at: calls.map(() => 0) };
  const schedules = texts.map((name) => prompts[name]?.map((text) => promptSchedule(text, pass)));
  const told = new Map<string, number>();
  const at = calls.map((call) => {
    const key = JSON.stringify(schedules.map((each) => each?.map((schedule) => textAt(schedule, call))));
    if (!told.has(key)) told.set(key, told.size);
    return told.get(key) as number;
  });
  const each = [...told.keys()].map((key) => {
    const said = JSON.parse(key) as (string[] | null)[];
    return Object.fromEntries(texts.map((name, i) => [name, said[i] ?? undefined]));
  });
  return { prompts: each.map((said) => ({ ...prompts, ...said })), at };
}

type Schedule = readonly { end: number; text: string }[];

const textAt = (schedule: Schedule, call: number): string =>
  (schedule.find(({ end }) => call <= end) ?? schedule[schedule.length - 1]).text;

/**
 * The texts of a prompt, each with its end, in rising order: the last call that sees it. Calls count from 0, so the first text has one
 * more than its share, as in A1111.
 */
export function promptSchedule(prompt: string, pass: Pass): Schedule {
  const ends = new Set([pass.calls]);
  const part = readAll({ ...pass, prompt, ends, known: new Map() });
  if (!part) return [{ end: pass.calls, text: prompt }];
  return [...ends].sort((a, b) => a - b).map((end) => ({ end, text: part(end) }));
}

/** A whole prompt; undefined for one that is text. */
function readAll(reading: Reading): Part | undefined {
  const { prompt } = reading;
  const parts: Part[] = [];
  for (let at = 0; ; ) {
    const { part, next } = sequence(reading, at, 0);
    parts.push(part);
    if (next === prompt.length) return joined(parts);
    const mark = prompt[next];
    if (!'[]():'.includes(mark)) return undefined;
    parts.push(() => mark);
    at = next + 1;
  }
}

const joined =
  (parts: readonly Part[]): Part =>
  (end) =>
    parts.map((part) => part(end)).join('');

/** Plain text and whole brackets as far as they go, if at all. */
function sequence(reading: Reading, from: number, depth: number): Read {
  const parts: Part[] = [];
  let next = from;
  for (;;) {
    const text = matchAt(plain, reading.prompt, next)?.[0];
    const read =
      text === undefined ? bracket(reading, next, depth) : { part: () => text, next: next + text.length };
    if (!read) return { part: joined(parts), next };
    parts.push(read.part);
    next = read.next;
  }
}

function matchAt(pattern: RegExp, text: string, at: number): RegExpExecArray | null {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** What opens at a place, if it is well formed. */
function bracket(reading: Reading, at: number, depth: number): Read | undefined {
  const { prompt, known } = reading;
  const open = prompt[at];
  if (open !== '(' && open !== '[') return undefined;
  if (!known.has(at)) {
    const inner = (from: number) => sequence(reading, from, depth + 1);
    const read = open === '(' ? rounded : squared;
    known.set(at, depth < mostDeep ? read(reading, inner(at + 1), inner) : undefined);
  }
  return known.get(at);
}

type Inner = (from: number) => Read;

/** `(a)` and `(a:b)`, behind `a`. */
function rounded({ prompt }: Reading, first: Read, inner: Inner): Read | undefined {
  if (prompt[first.next] === ')') return wrapped('(', first, ')');
  if (prompt[first.next] !== ':') return undefined;
  const { part, next } = inner(first.next + 1);
  if (prompt[next] !== ')') return undefined;
  return wrapped('(', { part: joined([first.part, () => ':', part]), next }, ')');
}

const wrapped = (open: string, { part, next }: Read, close: string): Read => ({
  part: (end) => `${open}${part(end)}${close}`,
  next: next + 1,
});

/** `[a]`, `[a|b]`, `[a:when]` and `[a:b:when]`, behind `a`. */
function squared(reading: Reading, first: Read, inner: Inner): Read | undefined {
  const { prompt } = reading;
  const mark = prompt[first.next];
  if (mark === ']') return wrapped('[', first, ']');
  if (mark === '|') return alternating(reading, first, inner);
  if (mark !== ':') return undefined;
  const alone = matchAt(when, prompt, first.next);
  if (alone) return edited(reading, () => '', first.part, alone);
  const second = inner(first.next + 1);
  const then = matchAt(when, prompt, second.next);
  return then ? edited(reading, first.part, second.part, then) : undefined;
}

/** `[a|b|c]`, behind `a`: the next of them with each call. */
function alternating({ prompt, ends, calls }: Reading, first: Read, inner: Inner): Read | undefined {
  const parts = [first.part];
  let { next } = first;
  while (prompt[next] === '|') {
    const read = inner(next + 1);
    parts.push(read.part);
    next = read.next;
  }
  if (prompt[next] !== ']') return undefined;
  for (let end = 1; end <= calls; end++) ends.add(end);
  return { part: (end) => parts[(end - 1) % parts.length](end), next: next + 1 };
}

function edited({ calls, before, ends }: Reading, from: Part, to: Part, found: RegExpExecArray): Read {
  const [{ length }, number] = found;
  const value = Number(number);
  const counted = number.includes('.')
    ? (value - (before === undefined ? 0 : 1)) * calls
    : value - (before ?? 0);
  const last = Math.min(calls, Math.trunc(counted));
  if (last >= 1) ends.add(last);
  return { part: (end) => (end <= last ? from(end) : to(end)), next: found.index + length };
}
