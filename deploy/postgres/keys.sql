-- Run by the image when the volume is new. On one that is there: docker compose exec postgres createdb -U letheon letheon_keys
CREATE DATABASE letheon_keys;
