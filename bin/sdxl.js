#!/usr/bin/env node
import { main } from '../dist/cli/main.js';

let status = 0;
// Said last, as a run file may have left something behind that ends the program. Without an error it may be that of a result that could
// not be written.
process.on('exit', () => {
  process.exitCode = status || process.exitCode;
});
status = await main(process.argv.slice(2));
