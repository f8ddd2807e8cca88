// LoRAs that a prompt names: `<lora:NAME:0.8>`, as A1111 (modules/extra_networks.py) and stable-diffusion.cpp (extract_and_remove_lora)
// read it. A tag is taken out of the text and nothing around it, so its spaces stay. Where one is named twice its weights add up, as in
// stable-diffusion.cpp; A1111 counts the last one's twice.
import { UserError } from '../../io/errors.ts';
import type { AdapterFile } from '../../models/lora/lora.ts';
import { number } from '../option_values.ts';
import { openLoraFolder } from './lora_folder.ts';

/** A prompt as it was typed, the text that is read of it, and what it is drawn with. */
export interface Prompt {
  typed: string;
  text: string;
  lora: readonly AdapterFile[];
}

/** The second word is A1111's for the same. */
const loraTag = /<(?:lora|lyco):([^>]+)>/g;

/** Where a text's last tag can end at the latest: behind it, each begin of one would have the rest read. */
const lastEnd = (text: string): number => text.lastIndexOf('>') + 1;

/** A text's tags, as they stand. */
export const loraTagsIn = (text: string): readonly string[] =>
  text.slice(0, lastEnd(text)).match(loraTag) ?? [];

/** What one of them says. */
interface Named {
  name: string;
  scale: number;
  textEncoderScale: number;
}

/** Prompts with the LoRAs of a folder that they name; without one tags are text. @throws UserError for a tag that cannot be heeded */
export function readPrompts(prompts: readonly string[], folder: string | undefined): Prompt[] {
  if (folder === undefined || !prompts.some((typed) => loraTagsIn(typed).length > 0))
    return prompts.map((typed) => ({ typed, text: typed, lora: [] }));
  const { fileOf } = openLoraFolder(folder);
  return prompts.map((typed) => {
    const { text, named } = withoutLoras(typed);
    const lora = new Map<string, AdapterFile>();
    for (const { name, scale, textEncoderScale } of named) {
      const path = fileOf(name);
      const { scale: more = 0, textEncoderScale: moreText = 0 } = lora.get(path) ?? {};
      lora.set(path, { path, scale: scale + more, textEncoderScale: textEncoderScale + moreText });
    }
    return { typed, text, lora: [...lora.values()] };
  });
}

/** The text of a prompt, and what its tags say. @throws UserError */
export function withoutLoras(prompt: string): { text: string; named: Named[] } {
  const named: Named[] = [];
  const end = lastEnd(prompt);
  const text = prompt.slice(0, end).replace(loraTag, (tag, said: string) => {
    named.push(namedBy(tag, said.split(':')));
    return '';
  });
  return { text: text + prompt.slice(end), named };
}

/** A name, perhaps a weight, perhaps another one for the UNet; in A1111 these may be called te and unet, too. */
function namedBy(tag: string, [name, ...weights]: readonly string[]): Named {
  const read = number(`the weight in "${tag}"`);
  const called = (key: string) => weights.find((each) => each.startsWith(`${key}=`))?.slice(key.length + 1);
  const plain = weights.filter((each) => !/^(te|unet)=/.test(each));
  if (plain.length > 2 || plain.some((each) => each.includes('=')))
    throw new UserError(
      `"${tag}" says more than is read: write <lora:NAME:0.8>, or <lora:NAME:0.5:0.8> with a second weight for the UNet`,
    );
  const textEncoderScale = read(called('te') ?? plain[0] ?? '1');
  const unet = called('unet') ?? plain[1];
  return { name, scale: unet === undefined ? textEncoderScale : read(unet), textEncoderScale };
}
