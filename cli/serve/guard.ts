// Who may ask the server: programs of this machine, and its own page. A web page from elsewhere, which any browser here may have open,
// may not: not by its own origin (Origin, Sec-Fetch-Site), nor by a name of its own that it has pointed at this machine (DNS rebinding;
// so the Host that is asked for has to be this machine's). Beyond this machine a key is needed, which no such page knows.
import { createHash, timingSafeEqual } from 'node:crypto';
import type { IncomingMessage } from 'node:http';
import { isIP } from 'node:net';

export interface Rules {
  /** The key that every request has to bring, as `Authorization: Bearer KEY` or as the password of Basic. */
  key?: string;
  /** Origins of other pages that may ask, such as `https://example.org`. */
  origins: readonly string[];
}

/** Whether only programs of this machine reach an address. */
export const isLoopback = (host: string): boolean =>
  host === 'localhost' || host === '::1' || (isIP(host) === 4 && host.startsWith('127.'));

/** Why a request is refused, with its status; undefined where it may pass. What is `keyless` anyone may ask for who may ask at all. */
export function refusal(
  request: IncomingMessage,
  { key, origins }: Rules,
  keyless: boolean,
): [status: number, reason: string] | undefined {
  const { origin } = request.headers;
  const host = (request.headers.host ?? '').toLowerCase();
  if (!key && !isLoopback(hostnameOf(host)))
    return [
      403,
      `this server answers to localhost, not to "${host}"; serve with --api-key-file to be reached by another name`,
    ];
  const allowed = origin === undefined || origin === `http://${host}` || origins.includes(origin);
  if (!allowed)
    return [403, `pages of ${origin} may not ask this server; serve with --cors ${origin} to let them`];
  const site = request.headers['sec-fetch-site'] ?? 'none';
  const opensPage = request.method === 'GET' && request.headers['sec-fetch-mode'] === 'navigate';
  if (origin === undefined && !['same-origin', 'none'].includes(`${site}`) && !opensPage)
    return [403, 'pages of other sites may not ask this server; serve with --cors ORIGIN to let one'];
  if (key && !keyless && !isKey(request.headers.authorization, key))
    return [401, 'this server asks for its key, as Authorization: Bearer KEY'];
  return undefined;
}

/** The name in `Host: NAME:PORT`, which may be an IPv6 address in brackets. */
const hostnameOf = (host: string): string =>
  /^\[([^\]]*)\](?::\d+)?$|^([^:]*)(?::\d+)?$/
    .exec(host)
    ?.slice(1)
    .find((each) => each !== undefined) ?? '';

function isKey(authorization = '', key: string): boolean {
  const [scheme, value = ''] = authorization.split(' ');
  const given = /^basic$/i.test(scheme)
    ? Buffer.from(value, 'base64').toString().split(':').slice(1).join(':')
    : /^bearer$/i.test(scheme)
      ? value
      : '';
  const digest = (text: string) => createHash('sha256').update(text).digest();
  return timingSafeEqual(digest(given), digest(key)); // takes as long for any key
}
