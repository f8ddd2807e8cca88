// A font of ASCII for labels of pictures, drawn for this: a machine without fonts draws the same text, and no library is asked. A letter is
// nine rows from the top of a capital to the foot of a g, each a digit of base 32 whose bits are five pixels, the left one the highest.

export const glyphWidth = 5;
export const glyphHeight = 9;

const glyphs = `
  000000000 444440400 aaa000000 aavavaa00 4fke5u400 pp248jj00 cik8lid00 444000000 248884200 842224800
  04lel4000 044v44000 000006240 000v00000 000006600 11248gg00 ehjlphe00 4c4444e00 eh1248v00 u11e11u00
  26aiv2200 vgu11he00 68guhhe00 v12244400 ehhehhe00 ehhf12c00 066006600 066006240 124842100 00v0v0000
  g84248g00 eh1240400 ehnlngf00 ehhvhhh00 uhhuhhu00 ehggghe00 uhhhhhu00 vgguggv00 vgguggg00 ehgnhhf00
  hhhvhhh00 e44444e00 72222ic00 hikokih00 ggggggv00 hrllhhh00 hppljjh00 ehhhhhe00 uhhuggg00 ehhhlid00
  uhhukih00 fgge11u00 v44444400 hhhhhhe00 hhhhaa400 hhhllrh00 hha4ahh00 hha444400 v1248gv00 e88888e00
  gg8421100 e22222e00 4ah000000 0000000v0 842000000 00e1fhf00 gguhhhu00 00fgggf00 11fhhhf00 00ehvgf00
  68u888800 00fhhhf1e gguhhhh00 40c444e00 2062222ic ggikoki00 c44444e00 00qllll00 00uhhhh00 00ehhhe00
  00uhhhugg 00fhhhf11 00mpggg00 00fge1u00 88u889600 00hhhhf00 00hhha400 00hhlla00 00ha4ah00 00hhhhf1e
  00v248v00 244844200 444444400 844244800 009li0000 vhhhhhv00`
  .trim()
  .split(/\s+/);

/** The rows of a character, each five bits; a box for one that is not in ASCII. */
export const glyph = (character: string): number[] =>
  [...(glyphs[character.charCodeAt(0) - 32] ?? glyphs[glyphs.length - 1])].map((row) =>
    Number.parseInt(row, 32),
  );
