// How many connections a server keeps, and which it ends where there are more: of those that it waits for, the oldest that has asked nothing
// yet, or else the one that has sent least. So a few hundred that say nothing, or a letter at a time, keep nobody out, and no time limit has
// to tell them from a slow upload. What is being answered stays.
import type { IncomingMessage, Server, ServerResponse } from 'node:http';
import type { Socket } from 'node:net';

const MOST_CONNECTIONS = 256;

/** What a connection has asked last, and its answer. */
interface Exchange {
  request: IncomingMessage;
  response: ServerResponse;
}

export function limitConnections(server: Server): void {
  const connections = new Map<Socket, Exchange | undefined>();
  server.on('connection', (socket: Socket) => {
    if (connections.size >= MOST_CONNECTIONS) {
      const ended = leastOf(connections);
      if (ended) connections.delete(ended);
      (ended ?? socket).destroy();
      if (!ended) return;
    }
    connections.set(socket, undefined);
    socket.on('close', () => connections.delete(socket));
  });
  server.on('request', (request: IncomingMessage, response: ServerResponse) => {
    if (connections.has(request.socket)) connections.set(request.socket, { request, response });
  });
}

/** The connection that is missed least; undefined where all are being answered. They are in the order in which they came. */
function leastOf(connections: ReadonlyMap<Socket, Exchange | undefined>): Socket | undefined {
  let least: Socket | undefined;
  for (const [socket, asked] of connections) {
    if (!asked) return socket;
    const { request, response } = asked;
    // It is the other side's turn: to send a body, to take the rest of an answer, or to ask again.
    const isWaitedFor = !request.complete || response.writableEnded;
    if (isWaitedFor && socket.bytesRead < (least?.bytesRead ?? Number.POSITIVE_INFINITY)) least = socket;
  }
  return least;
}
