#!/usr/bin/env node
import { main } from '../dist/cli/main.js';

const status = await main(process.argv.slice(2));
process.exitCode ||= status; // it may be that of a result that could not be written
