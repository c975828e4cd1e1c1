-- The database of a KME, and its owner: a role that is not a superuser, so that row-level security applies.
CREATE ROLE kme LOGIN PASSWORD 'kme';
CREATE DATABASE kme OWNER kme ENCODING 'UTF8' TEMPLATE template0;
