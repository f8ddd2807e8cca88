// The captions under which Gal et al. 2022 (appendix) learn a textual inversion: ImageNet's templates of CLIP (Radford et al. 2021), about
// an object or in a style. kohya's and diffusers' scripts have the same, two of style twice.

const object = `a photo of a, a rendering of a, a cropped photo of the, the photo of a, a photo of a clean, a photo of a dirty,
a dark photo of the, a photo of my, a photo of the cool, a close-up photo of a, a bright photo of the, a cropped photo of a,
a photo of the, a good photo of the, a photo of one, a close-up photo of the, a rendition of the, a photo of the clean,
a rendition of a, a photo of a nice, a good photo of a, a photo of the nice, a photo of the small, a photo of the weird,
a photo of the large, a photo of a cool, a photo of a small`;

const style = `a painting, a rendering, a cropped painting, the painting, a clean painting, a dirty painting, a dark painting,
a picture, a cool painting, a close-up painting, a bright painting, a good painting, a rendition, a nice painting,
a small painting, a weird painting, a large painting`;

/** The captions of every picture, which hold the token; undefined where pictures have captions of their own. */
export function templatesOf(
  learnable_property: '' | 'object' | 'style',
  placeholder_token: string,
): string[] | undefined {
  if (learnable_property === '') return undefined;
  const [list, between] = learnable_property === 'style' ? [style, ' in the style of'] : [object, ''];
  return list.split(/,\s/).map((words) => `${words}${between} ${placeholder_token}`);
}
