// The database of the test, as its address was handed over: a socket's folder, since the server listens to nothing else.

export interface Address {
  host: string;
  port: number;
  user: string;
  database: string;
}
