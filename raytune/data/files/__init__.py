"""Files and hubs that rows come from: found, opened, read whole or in pieces, each bad row named by its line."""
