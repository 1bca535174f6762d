// Asks the command for what has changed, again and again, and says when it, or the daemon behind it, has gone.

const RETRY = 1000; // milliseconds
const PATIENCE = 40000; // milliseconds that one answer may take: the command waits for news

/** A refusal of the command: its status, and its words. */
export class RefusedError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The connection to the command that serves this page. The token is what the page's address has behind `#`. */
export class Connection {
  #token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";

  /** Asks for a path with a query. Returns the answer's value; throws RefusedError, or TypeError if nobody answers. */
  async ask(path, query = {}) {
    const response = await fetch(`${path}?${new URLSearchParams(query)}`, {
      headers: { Authorization: `Bearer ${this.#token}` },
      credentials: "omit",
      signal: AbortSignal.timeout(PATIENCE),
    });
    if (!response.ok) throw new RefusedError(response.status, (await response.text()).replace(/^weightd web: /, "").trim());
    return response.json();
  }

  /**
   * Calls `onSections` with the values by name of the sections that have changed, for ever; and `onTrouble` with a
   * sentence while nothing can be asked, with null when it can again.
   */
  async follow(onSections, onTrouble) {
    const versions = {};
    for (;;) {
      try {
        const sections = await this.ask("/api/state", versions);
        onTrouble(null);
        const values = {};
        for (const [name, { version, value }] of Object.entries(sections)) {
          versions[name] = version;
          values[name] = value;
        }
        onSections(values);
      } catch (error) {
        if (error instanceof RefusedError && error.status === 401) {
          onTrouble("The command does not know this page’s token: it was started again. Open the address that it has printed.");
        } else if (error instanceof RefusedError) {
          onTrouble(error.message);
        } else if (error instanceof TypeError || error.name === "TimeoutError") {
          onTrouble("The command `weightd web` has gone: what you see is old. Start it again, and open the address that it prints.");
        } else {
          throw error;
        }
        await new Promise((resolve) => { setTimeout(resolve, RETRY); });
        for (const name of Object.keys(versions)) delete versions[name]; // another command counts anew
      }
    }
  }
}
