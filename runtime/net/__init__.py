"""The parties as processes: deployments, TLS links, the store of dealt material, the party's server, its clients."""
