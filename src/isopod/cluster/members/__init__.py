"""Who belongs to the cluster: identity, credentials, joining and leaving, failure detection. `isopod.cluster.member` puts it together."""
