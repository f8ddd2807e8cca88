// Connections through a proxy that are silent, at each point where they may be, and a proxy by its IPv6 address. (Downloads through one are
// in hub.test.ts.)
import { createServer } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import { type Test, test } from 'tap';
import { fetchOf } from '../../io/proxy.ts';

/** A proxy to a server that answers the path's words, named by the environment; of a CONNECT to a `mute` host it says nothing. */
async function proxied(t: Test, host = '127.0.0.1'): Promise<void> {
  const server = createServer(({ url }, response) => {
    if (url === '/silent') return;
    response.writeHead(200, { 'content-length': 10 });
    if (url === '/half') response.write('12345');
    else response.end('1234567890');
  });
  const proxy = createServer().on('connect', (request, client) => {
    if (request.url?.startsWith('mute')) return;
    const { port } = server.address() as AddressInfo;
    const onward = connect(port, '127.0.0.1', () => client.write('HTTP/1.1 200 OK\r\n\r\n'));
    onward.pipe(client).pipe(onward);
    for (const end of [client, onward]) end.on('error', () => undefined);
    t.teardown(() => onward.destroy());
  });
  for (const each of [server, proxy]) {
    t.teardown(() => {
      each.closeAllConnections();
      each.close();
    });
    await new Promise<void>((ready, fail) => {
      each.on('error', fail);
      each.listen(0, each === proxy ? host : '127.0.0.1', ready);
    });
  }
  const { port } = proxy.address() as AddressInfo;
  process.env.HTTP_PROXY = `http://${host.includes(':') ? `[${host}]` : host}:${port}`;
  t.teardown(() => delete process.env.HTTP_PROXY);
}

test('what is silent is given up', { timeout: 20_000 }, async (t) => {
  await proxied(t);
  const patience = 200;
  const says = { message: 'nothing came for 0.2 s' };
  await t.rejects(fetchOf('http://mute.invalid/all', {}, patience), /nothing came for 0\.2 s/, 'the proxy');
  await t.rejects(fetchOf('http://hub.invalid/silent', {}, patience), says, 'the server');
  const half = await fetchOf('http://hub.invalid/half', {}, patience);
  await t.rejects(half.text(), says, 'the server, in the middle');
  t.equal(await (await fetchOf('http://hub.invalid/all', {}, patience)).text(), '1234567890');
});

test('a proxy by its IPv6 address', async (t) => {
  try {
    await proxied(t, '::1');
  } catch (error) {
    t.match(error, { code: /^(EADDRNOTAVAIL|EAFNOSUPPORT)$/ }, 'this machine has no IPv6');
    return;
  }
  t.equal(await (await fetchOf('http://hub.invalid/all', {})).text(), '1234567890');
});
