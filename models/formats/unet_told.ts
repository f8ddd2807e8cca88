// What the UNet in a file without a config is, where its tensors tell it and the published models' config, or a lender's, says another
// thing: how deep each transformer is and what the middle block has (SSD-1B and Segmind-Vega are known so), and how it is told its guidance.
import type { Json } from '../checkpoint/checkpoint.ts';
import { parseUNetConfig, type UNetConfig } from '../unet/unet.ts';
import type { Depths } from '../unet/unet_encoder.ts';
import { unetKeyInSgm } from '../unet/unet_keys.ts';

/** Where the UNet's tensors are: behind a prefix, in the original's words or diffusers'. */
interface Spelling {
  prefix: string;
  original: boolean;
}

/** The fields of `config` that the file's tensors say otherwise. @throws UserError for a config of another architecture */
export function toldIn(
  tensors: ReadonlyMap<string, { shape: readonly number[] }>,
  { prefix, original }: Spelling,
  json: Json,
): Partial<UNetConfig> {
  const config = parseUNetConfig(json);
  const spelled = (key: string) => prefix + (original ? unetKeyInSgm(key, config) : key);
  const names = [...tensors.keys()];
  // No program has a word of its own for this layer.
  const guidance = tensors.get(`${prefix}time_embedding.cond_proj.weight`);
  const middle = middleIn(names, spelled);
  return {
    ...(guidance && { time_cond_proj_dim: guidance.shape[1] }),
    ...(middle !== config.mid_block_type && { mid_block_type: middle }),
    ...depthsIn(names, config, spelled),
  };
}

function middleIn(names: readonly string[], spelled: (key: string) => string): UNetConfig['mid_block_type'] {
  const has = (part: string) => {
    const start = spelled(`mid_block.${part}.`);
    return names.some((name) => name.startsWith(start));
  };
  if (has('attentions.0') || has('resnets.1')) return 'UNetMidBlock2DCrossAttn';
  return has('resnets.0') ? 'UNetMidBlock2D' : null;
}

/** The depths of both ways where any is not the config's, each transformer's apart, as the published models' configs have them. */
function depthsIn(
  names: readonly string[],
  config: UNetConfig,
  spelled: (key: string) => string,
): Partial<UNetConfig> {
  const blocks = new Map<string, number>();
  for (const name of names) {
    const [, path, block] = /^(.+\.transformer_blocks\.)(\d+)\./.exec(name) ?? [];
    if (path) blocks.set(path, Math.max(blocks.get(path) ?? 0, Number(block) + 1));
  }
  const { transformer_layers_per_block: said, layers_per_block: layers } = config;
  const down = config.block_out_channels.map((_, i) => (typeof said === 'number' ? said : said[i]));
  const up = config.reverse_transformer_layers_per_block ?? down.toReversed();
  let differ = false;
  const read = (way: string, types: readonly string[], said: readonly Depths[], count: number) =>
    said.map((depths, i): Depths => {
      const found = Array.from(
        { length: count },
        (_, j) => blocks.get(spelled(`${way}_blocks.${i}.attentions.${j}.transformer_blocks.`)) ?? 0,
      );
      // A level that lacks all of its transformers is damaged, which is told when its weights are read.
      if (!types[i].startsWith('CrossAttn') || found.every((depth) => depth === 0)) return depths;
      differ ||= found.some((depth, j) => depth !== (typeof depths === 'number' ? depths : depths[j]));
      return found;
    });
  const told = {
    transformer_layers_per_block: read('down', config.down_block_types, down, layers),
    reverse_transformer_layers_per_block: read('up', config.up_block_types, up, layers + 1),
  };
  return differ ? told : {};
}
