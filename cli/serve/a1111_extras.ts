// A1111's routes that enlarge pictures which are there, one or some. Faces are not restored.
import { UserError } from '../../io/errors.ts';
import { isRecord } from '../../io/json.ts';
import {
  type Body,
  base64,
  booleanOf,
  labelled,
  numberOf,
  only,
  pictureBytes,
  readFields,
  textOf,
  unheeded,
} from './fields.ts';
import type { HttpRequest, Reply, Routes } from './http.ts';
import type { Drawn, Enlarging, Order } from './messages.ts';
import type { Queue } from './queue.ts';
import { mostPictures, mostSide, type Served } from './served.ts';

/** Names of what enlarges finished pictures. */
export const upscalerNames = ({ networks }: Served): string[] => ['Lanczos', 'Nearest', ...networks.keys()];

/** Keys that are read below, or say nothing here. */
const taken = [
  ...['image', 'imageList', 'resize_mode', 'upscaling_resize', 'upscaling_resize_w', 'upscaling_resize_h'],
  ...['upscaling_crop', 'upscaler_1', 'upscaler_2', 'extras_upscaler_2_visibility'],
  ...['show_extras_results', 'codeformer_weight', 'upscale_first'],
];

const fields = {
  ...Object.fromEntries(taken.map((key) => [key, unheeded])),
  resize_mode: only(0, 1),
  gfpgan_visibility: only(0),
  codeformer_visibility: only(0),
};

/** How a request's pictures are enlarged, with A1111's defaults. @throws UserError */
function enlargingOf(body: Body, served: Served): Enlarging {
  readFields(body, fields, served.tellIgnored);
  const upscaler = (key: string): string => {
    const name = labelled(key, textOf(body[key] ?? 'None', key), ['None', ...upscalerNames(served)]);
    return served.networks.get(name) ?? name;
  };
  const number = (key: string, usual: number, max: number): number =>
    numberOf(body[key] ?? usual, key, { min: 0, max });
  const side = (key: string): number =>
    numberOf(body[key] ?? 512, key, { min: 1, max: mostSide, whole: true });
  const crop = booleanOf(body.upscaling_crop ?? true, 'upscaling_crop');
  const sides = { width: side('upscaling_resize_w'), height: side('upscaling_resize_h'), crop };
  const by = number('upscaling_resize', 2, mostSide);
  return {
    upscalers: [upscaler('upscaler_1'), upscaler('upscaler_2')],
    visibility: number('extras_upscaler_2_visibility', 0, 1),
    size: body.resize_mode === 1 ? sides : { by },
  };
}

/** The pictures of a list of files with their names. @throws UserError */
function listed({ imageList: list }: Body): Order['pictures'] {
  if (!Array.isArray(list) || list.length === 0 || list.length > mostPictures)
    throw new UserError(`imageList takes a list of 1 to ${mostPictures} objects, each with data and a name`);
  return Object.fromEntries(
    list.map((each, i) => {
      const name = `picture ${i} of imageList`;
      return [name, pictureBytes(isRecord(each) ? each.data : undefined, name)];
    }),
  );
}

const escaped = (text: string): string => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

export function a1111Extras(served: Served, queue: Queue): Routes {
  const enlarge = async (
    { json, signal }: HttpRequest,
    picturesOf: (body: Body) => Order['pictures'],
    answer: (drawn: readonly Drawn[]) => Record<string, unknown>,
  ): Promise<Reply> => {
    const body = await json();
    const order = {
      settings: {},
      pictures: picturesOf(body),
      remade: { enlarging: enlargingOf(body, served) },
    };
    const drawn = await queue.draw(order, signal);
    return { json: { ...answer(drawn), html_info: `<p>${escaped(drawn.at(-1)?.parameters ?? '')}</p>` } };
  };
  return {
    'POST /sdapi/v1/extra-single-image': (asked) =>
      enlarge(
        asked,
        ({ image }) => ({ image: pictureBytes(image, 'image') }),
        ([drawn]) => ({ image: drawn ? base64(drawn.png) : null }),
      ),
    'POST /sdapi/v1/extra-batch-images': (asked) =>
      enlarge(asked, listed, (drawn) => ({ images: drawn.map(({ png }) => base64(png)) })),
  };
}
