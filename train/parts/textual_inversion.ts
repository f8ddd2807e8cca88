// Training a textual inversion (Gal et al. 2022): vectors of a new token, behind both text encoders' tables as `sdxl sample` puts them
// there, are all that learns; encoders, UNet and VAE are frozen. The encoders run in each pass, as what they say of a caption moves with
// the vectors. (diffusers' and kohya's scripts give the whole tables gradients and moments, and put the other rows back after each step.)
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, type Parameter } from '../../engine/module.ts';
import { embedding } from '../../engine/ops/move.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import type { TextStack, TokenizedEncoder } from '../../models/text/conditioning.ts';
import {
  addToken,
  knownToken,
  parts,
  readTextualInversion,
  vectorsFor,
} from '../../models/text/textual_inversion.ts';
import type { Sample } from '../data/survey.ts';
import type { Run } from '../run/run.ts';
import type { Added } from './added.ts';

/**
 * Gives the loaded pipeline the token that a run trains. `resumed` runs have vectors of their own, and begin with none.
 * @throws UserError for a token that is a word already, what it cannot begin with, and captions that it does not stand in
 */
export function withToken(
  { textual_inversion, dataset }: Run,
  pipeline: Pipeline,
  samples: readonly Sample[],
  resumed: boolean,
): Added {
  const { text } = pipeline;
  const { placeholder_token: token, num_vectors } = textual_inversion;
  if (text.encoders.length < parts.length)
    throw new UserError(
      'the model has one text encoder, as a refiner has, and a textual inversion for SDXL is of two; train one for the base model, with another "model"',
    );
  refuseKnown(text, textual_inversion);
  addToken(text, token, resumed ? nothing(text, num_vectors) : beginning(text, textual_inversion));
  refuseAbsent(text, token, samples, dataset);
  const parameters = vectorsOf(text);
  return {
    component: {
      ...{ name: 'textual_inversion', file: `${token}.safetensors` },
      metadata: metadataOf(token),
      parameters,
      trained: [...parameters.keys()],
    },
    putOn(other) {
      for (const [i, rows] of nothing(text, num_vectors).entries())
        other.text.encoders[i].encoder.addTokens(rows);
      return { other, parameters: vectorsOf(other.text) };
    },
  };
}

/** By their names in a file. */
const vectorsOf = ({ encoders }: TextStack): Map<string, Parameter> =>
  new Map(encoders.map(({ encoder }, i) => [parts[i], encoder.addedTokens() as Parameter]));

const nothing = ({ encoders }: TextStack, count: number): Float32Array[] =>
  encoders.map(({ encoder }) => new Float32Array(count * encoder.hidden_size));

/** A token that prompts hold anyway would change what they mean. */
function refuseKnown(
  text: TextStack,
  { placeholder_token: token, num_vectors }: Run['textual_inversion'],
): void {
  const isWord = text.encoders.some(({ tokenizer }) => tokenizer.tokenize(token).length === 1);
  const known = isWord ? token : knownToken(text, token, num_vectors);
  if (known === undefined) return;
  throw new UserError(
    `textual_inversion.placeholder_token is "${token}", and the tokenizer has a token "${known}" already; make up another, such as "<${token}>"`,
  );
}

/** The vectors that a run begins with, for each encoder: those of a file, or of a word. */
function beginning(
  text: TextStack,
  { weights, num_vectors, ...words }: Run['textual_inversion'],
): Float32Array[] {
  if (!weights) return text.encoders.map((each) => vectorsOfWord(each, words.initializer_token, num_vectors));
  const read = readTextualInversion(weights, words.placeholder_token);
  if (read.clip_l.count !== num_vectors)
    throw new UserError(
      `textual_inversion.weights ${weights} has ${read.clip_l.count} vectors, and the run ${num_vectors}; set textual_inversion.num_vectors to that`,
    );
  return vectorsFor(text, weights, read);
}

/** What an encoder reads for a word; of one with fewer tokens than there are vectors again and again, as kohya's. */
function vectorsOfWord({ tokenizer, encoder }: TokenizedEncoder, word: string, count: number): Float32Array {
  const ids = tokenizer.tokenize(word);
  if (ids.length === 0 || ids.length > count)
    throw new UserError(
      `textual_inversion.initializer_token "${word}" comes to ${ids.length} tokens, and textual_inversion.num_vectors is ${count}; ${
        ids.length ? `set that to ${ids.length}, or choose a shorter word` : 'choose a word'
      }`,
    );
  const table = namedParameters(encoder).get('text_model.embeddings.token_embedding.weight') as Parameter;
  const rows = Int32Array.from({ length: count }, (_, i) => ids[i % ids.length]);
  const { device } = table.tensor;
  return noGrad(() =>
    scope(() => embedding(tensor(rows, [count], { device, dtype: 'int32' }), table.tensor).floats()),
  );
}

/** Captions that teach nothing of the token. */
function refuseAbsent(
  { encoders: [{ tokenizer, encoder }], chunks }: TextStack,
  token: string,
  samples: readonly Sample[],
  { max_token_length }: Run['dataset'],
): void {
  const last = encoder.vocab_size + (encoder.addedTokens() as Parameter).shape[0] - 1;
  const captions = [...new Set(samples.flatMap((sample) => sample.captions))];
  const lacking = captions.filter((text) => !tokenizer.encode(text, chunks).ids.includes(last));
  if (lacking.length === 0) return;
  const [first] = lacking;
  const some = `${lacking.length} of ${captions.length} captions`;
  throw new UserError(
    tokenizer.tokenize(first).includes(last)
      ? `${some} have "${token}" past the tokens that are read, such as "${first}"; write it further to the front, or raise dataset.max_token_length above ${max_token_length}`
      : `${some} have no "${token}", such as "${first}"; write it into each, or set textual_inversion.learnable_property to "object" or "style" for templates in their place`,
  );
}

/** kohya's words for what the file holds. */
const metadataOf = (token: string): Record<string, string> => ({
  'modelspec.sai_model_spec': '1.0.0',
  'modelspec.architecture': 'stable-diffusion-xl-v1-base/textual-inversion',
  'modelspec.implementation': 'https://github.com/Stability-AI/generative-models',
  'modelspec.title': token,
});
