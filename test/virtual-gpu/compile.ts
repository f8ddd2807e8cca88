// A block of straight-line PTX as one JavaScript function that loops over the lanes of a mask: registers that live across
// blocks are loaded from the warp's register file, computed on as local variables, and stored back. Compiled when first
// run, so unrolled variants that a shape never enters cost nothing.
import { clusterFunctions } from './cluster.ts';
import { type Locate, newEmitter, variable } from './emit.ts';
import { convert, floatInstructions, isFloat } from './emit_float.ts';
import { integerInstructions } from './emit_integer.ts';
import { memoryInstructions } from './emit_memory.ts';
import type { Block } from './flow.ts';
import { defines } from './flow.ts';
import type { Machine } from './machine.ts';
import * as numbers from './numbers.ts';
import type { Instruction, Register } from './ptx.ts';
import { isWide, typeOf } from './ptx.ts';

/** Runs lanes `mask` of the warp whose registers begin at `base`; returns the lanes that take the block's branch. */
export type Chunk = (base: number, mask: number) => number;

const num = { ...numbers };

/** What generated code sees, by name. */
function environment(m: Machine): Record<string, unknown> {
  const views = (letter: string, memory: Machine['global']) => ({
    [`${letter}I`]: memory.i32,
    [`${letter}F`]: memory.f32,
    [`${letter}H`]: memory.u16,
    [`${letter}B`]: memory.u8,
    [`${letter}S32`]: memory.shadow32,
    [`${letter}S16`]: memory.shadow16,
    [`${letter}S8`]: memory.shadow8,
  });
  return {
    ...views('G', m.global),
    ...views('S', m.shared),
    ...views('L', m.local),
    ...{ m, num, R: m.registers, F: m.floats, fround: Math.fround, parameters: m.parameters },
    ...{ fault: m.fault, race: m.race, atomic: m.atomic, copyAsync: m.copyAsync, ...clusterFunctions(m) },
  };
}

/** For the block that runs now, and those of its rank in other clusters: what they see of shared memory is the same. */
export function compileBlock(block: Block, machine: Machine, locate: Locate): Chunk {
  const names = environment(machine);
  const source = generate(block, locate);
  const make = new Function(...Object.keys(names), `"use strict";return ${source}`);
  return make(...Object.values(names)) as Chunk;
}

/** The JavaScript of a block. */
function generate(block: Block, locate: Locate): string {
  const e = newEmitter(locate);
  const emit = (i: Instruction) => {
    const { opcode } = i;
    const common = opcode === 'cvt' ? convert : memoryInstructions[opcode];
    if (common) return common(e, i, '');
    const type = typeOf(i);
    const byType = isFloat(type) ? floatInstructions[opcode] : undefined;
    const found = byType ?? integerInstructions[opcode];
    if (!found) e.unsupported(i);
    found(e, i, type);
  };
  for (const i of block.instructions) {
    if (i.guard) e.line(`if(${i.guard.negated ? '!' : ''}${e.predicate(i.guard.register)}){`);
    emit(i);
    if (i.guard) e.line('}');
  }
  let taken = '';
  const guard = block.branch?.guard;
  if (guard) taken = `if(${guard.negated ? '!' : ''}${e.predicate(guard.register)})taken|=1<<l;`;
  const { load, store } = liveRegisters(block, e.touched);
  const body = e.lines.join('\n');
  return `(base,mask)=>{let taken=0;for(let l=0;l<32;l++){if((mask>>>l&1)===0)continue;const a=base+l;
${load}\n${body}\n${store}${taken}}\nreturn taken;}`;
}

/** Declarations of the block's registers, loaded where they are live before it, and stores of those live after it. */
function liveRegisters(block: Block, touched: ReadonlySet<Register>): { load: string; store: string } {
  const written = new Set(block.instructions.flatMap(defines));
  const declarations: string[] = [];
  const stores: string[] = [];
  for (const r of touched) {
    const v = variable(r);
    const enters = block.liveIn.has(r);
    const leaves = written.has(r) && block.liveOut.has(r);
    const low = `R[a+${r.plane * 32}]`;
    const high = `R[a+${r.plane * 32 + 32}]`;
    if (isWide(r.type)) {
      declarations.push(enters ? `${v}l=${low},${v}h=${high}` : `${v}l=0,${v}h=0`);
      if (leaves) stores.push(`${low}=${v}l;${high}=${v}h;`);
    } else if (r.type === 'f64') {
      declarations.push(`${v}=${enters ? `num.doubleOfBits(${low},${high})` : '0.5'}`);
      if (leaves) stores.push(`${low}=num.lowOfDouble(${v});${high}=num.highOfDouble(${v});`);
    } else {
      const place = r.type === 'f32' ? `F[a+${r.plane * 32}]` : low;
      declarations.push(`${v}=${enters ? place : r.type === 'f32' ? '0.5' : '0'}`);
      if (leaves) stores.push(`${place}=${v};`);
    }
  }
  return { load: declarations.length ? `let ${declarations.join(',')};` : '', store: stores.join('') };
}
