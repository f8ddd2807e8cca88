// The pictures behind the model that ships: Microsoft's Fluent emoji (MIT, @iconify-json/fluent-emoji-flat), drawn on white,
// with a metadata.jsonl of captions. A caption says the name and, in other choices, the colours that the drawing shows, the
// kind of thing it is, and emojilib's keywords. Skin tones are left out: they would be half of all pictures.
//   node dist/configs/emoji_data.js FOLDER
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import sharp from 'sharp';
import { UserError } from '../io/errors.ts';
import { writeFileAtomic } from '../io/files.ts';
import { readJson } from '../io/json.ts';
import { coloursOf, colourWords } from './emoji_colours.ts';

/** Raise when pictures or captions change, so that folders drawn before are drawn anew. */
const edition = 1;

/** Icons are 32 units wide and drawn with a margin of one, as some touch their edges. */
const viewBox = '-1 -1 34 34';

export interface Emoji {
  /** Its name in words: "red heart". */
  name: string;
  kind: string;
  keywords: string[];
  svg: string;
}

/** What small models draw worst and people ask for first: eight flags and two dozen fruits and vegetables. */
export const isFlagOrFruit = ({ kind, keywords }: Emoji): boolean =>
  kind === kindWords.Flags || keywords.includes('fruit');

/**
 * Draws every emoji into `folder` at `side` x `side` pixels, flags and fruit `flagsAndFruit` times each, unless they are
 * there already, and returns the folder. Every load of a run file comes by here, so nothing is read before the stamp.
 */
export async function drawEmoji(folder: string, { flagsAndFruit = 1, side = 64 } = {}): Promise<string> {
  const edited = `${edition} ${side} ${flagsAndFruit}\n`;
  const stamp = join(folder, 'edition.txt');
  if (readText(stamp) === edited) return folder;
  const all = allEmoji();
  mkdirSync(folder, { recursive: true });
  rmSync(stamp, { force: true });
  const rows: string[] = [];
  const list: string[] = [];
  for (const [i, emoji] of all.entries()) {
    const { rgba, png } = await draw(emoji, side);
    const colours = coloursOf(rgba);
    const file_name = `${emoji.name.replaceAll(' ', '-')}.png`;
    const copies = isFlagOrFruit(emoji) ? flagsAndFruit : 1;
    for (let copy = 1; copy <= copies; copy++) {
      const own = copy === 1 ? file_name : file_name.replace('.png', `-${copy}.png`);
      writeFileSync(join(folder, own), png);
      rows.push(JSON.stringify({ file_name: own, text: captionsOf(emoji, colours) }));
    }
    if (isJudged(i, all.length))
      list.push(JSON.stringify({ file_name, ...judgedPrompt(emoji, colours, list.length) }));
  }
  writeFileAtomic(join(folder, 'metadata.jsonl'), `${rows.join('\n')}\n`);
  writeFileAtomic(join(folder, 'judged.jsonl'), `${list.join('\n')}\n`);
  writeFileAtomic(stamp, edited);
  return folder;
}

/** The choices for a caption, from plain to full; prompts of both kinds then work. */
function captionsOf({ name, kind, keywords }: Emoji, colours: readonly string[]): string[] {
  const told = keywords.slice(0, 4);
  return [
    name,
    [name, ...colours].join(', '),
    [name, kind, ...told].join(', '),
    [name, kind, ...colours, ...told].join(', '),
  ];
}

/** The model is judged on 200 emoji, evenly spread over the names. */
const judged = 200;
const isJudged = (i: number, count: number): boolean =>
  Math.floor((i * judged) / count) !== Math.floor(((i - 1) * judged) / count);

/** A prompt in an order of words that no caption has, and the seed of its noise. */
const judgedPrompt = ({ name, kind }: Emoji, colours: readonly string[], number: number) => ({
  prompt: [name, ...colours, kind].join(', '),
  seed: 1000 + number,
});

async function draw({ svg }: Emoji, side: number): Promise<{ rgba: Uint8Array; png: Uint8Array }> {
  const file = Buffer.from(
    `<svg xmlns="http://www.w3.org/2000/svg" width="${side}" height="${side}" viewBox="${viewBox}">${svg}</svg>`,
  );
  const image = sharp(file);
  const png = await image.clone().flatten({ background: '#ffffff' }).png({ palette: false }).toBuffer();
  return { rgba: await image.ensureAlpha().raw().toBuffer(), png };
}

/** Every emoji but the skin tones, in the order of their names. */
export function allEmoji(): Emoji[] {
  const read = <T>(file: string) => readJson(locate(file)) as T;
  const set = '@iconify-json/fluent-emoji-flat';
  const { icons } = read<{ icons: Record<string, { body: string }> }>(`${set}/icons.json`);
  const { categories } = read<{ categories: Record<string, string[]> }>(`${set}/metadata.json`);
  const codes = read<Record<string, string>>(`${set}/chars.json`);
  const codeOf = new Map(Object.entries(codes).map(([code, name]) => [name, code]));
  const library = Object.entries(read<Record<string, string[]>>('emojilib/dist/emoji-en-US.json'));
  const keywords = new Map(library.map(([text, words]) => [codePoints(text), words]));
  const kinds = new Map(Object.entries(categories).flatMap(([kind, all]) => all.map((name) => [name, kind])));
  const tone = /-(light|medium-light|medium|medium-dark|dark)$/;
  return Object.keys(icons)
    .filter((id) => !(tone.test(id) && Object.hasOwn(icons, id.replace(tone, ''))))
    .sort()
    .map((id) => {
      const name = id.replaceAll('-', ' ');
      const kind = kindWords[kinds.get(id) ?? ''] ?? 'thing';
      const said = (keywords.get(codeOf.get(id) ?? '') ?? []).map((word) =>
        word.replace(/[_-]/g, ' ').toLowerCase(),
      );
      const telling = said.filter((word) => isTelling(word) && word !== kind && !name.includes(word));
      return { name, kind, keywords: [...new Set(telling)], svg: icons[id].body };
    });
}

/** Only plain words: smileys such as ":D" are keywords too, and so are colours that the drawing does not have. */
const isTelling = (word: string): boolean =>
  /^[a-z][a-z ]+$/.test(word) &&
  !/shit|fuck|damn/.test(word) &&
  !colourWords.some((colour) => word.includes(colour));

const kindWords: Record<string, string> = {
  Activities: 'activity',
  'Animals & Nature': 'nature',
  Flags: 'flag',
  'Food & Drink': 'food',
  Objects: 'object',
  'People & Body': 'person',
  'Smileys & Emotion': 'emotion',
  Symbols: 'symbol',
  'Travel & Places': 'travel',
};

/** As chars.json writes them: hexadecimal with dashes, without the mark that asks for the colourful form. */
const codePoints = (text: string): string =>
  [...text]
    .map((character) => (character.codePointAt(0) as number).toString(16))
    .filter((code) => code !== 'fe0f')
    .join('-');

function locate(file: string): string {
  try {
    return createRequire(import.meta.url).resolve(file);
  } catch {
    throw new UserError(`${file} is not installed: run "npm ci" in a clone of the repository`);
  }
}

function readText(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return undefined;
  }
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  try {
    const folder = process.argv[2];
    if (!folder) throw new UserError('no folder is given: name the one to draw the emoji into');
    console.log(await drawEmoji(folder));
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    console.error(error.message);
    process.exitCode = 2;
  }
}
