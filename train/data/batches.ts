// Lists cut up for models that take several things at once, if these are of one kind: pictures of a size, captions by so many.

/** Items of a kind together; kinds and items in the order that they come in. */
export function grouped<Item, Kind>(items: readonly Item[], kindOf: (item: Item) => Kind): Map<Kind, Item[]> {
  const groups = new Map<Kind, Item[]>();
  for (const item of items) {
    const kind = kindOf(item);
    const group = groups.get(kind);
    if (group) group.push(item);
    else groups.set(kind, [item]);
  }
  return groups;
}

/** Slices of `size` items, the last of which may be shorter. */
export const slices = <Item>(items: readonly Item[], size: number): Item[][] =>
  Array.from({ length: Math.ceil(items.length / size) }, (_, i) => items.slice(i * size, (i + 1) * size));
