"""What the tests know of each TLS extension: the messages that may carry it, and its contents."""

from hypothesis import strategies as st

from hybridkex.wire import extensions as ext

RFC_9846_SECTION_4_3 = {  # the types that this library knows
    0: "CH EE",
    10: "CH EE",
    13: "CH CR",
    16: "CH EE",
    19: "CH EE",
    20: "CH EE",
    21: "CH",
    28: "CH EE",  # RFC 8449; the table of RFC 9846 does not list it
    33: "CH SH",  # RFC 9973
    41: "CH SH",
    42: "CH EE NST",
    43: "CH SH HRR",
    44: "CH HRR",
    45: "CH",
    47: "CH CR",
    48: "CR",
    49: "CH",
    50: "CH CR",
    51: "CH SH HRR",
    0xFF3E: "CH EE CR NST",  # draft-ietf-tls-tlsflags: where we take notice, or may ignore it
    0xFF3F: "CH EE",  # ours
    0xFF40: "CH EE",  # ours
}

u8s, u16s = st.integers(0, 0xFF), st.integers(0, 0xFFFF)
u32s = st.integers(0, 0xFFFFFFFF)
blobs = st.binary(min_size=1, max_size=40)
codes = st.lists(u16s, min_size=1, max_size=6).map(tuple)
types8 = st.lists(u8s, min_size=1, max_size=4).map(tuple)
# What is the default alone is not said (RFC 7250 section 4.1).
certificate_types = types8.filter(lambda types: types != (0,))
names = st.text("abcdefghijklmnopqrstuvwxyz.-0123456789", min_size=1, max_size=30)
entries = st.builds(ext.KeyShareEntry, u16s, blobs)
offers = st.integers(1, 3).flatmap(
    lambda count: st.builds(
        ext.PreSharedKeyOffer,
        st.tuples(*[st.builds(ext.OfferedPskIdentity, blobs, u32s)] * count),
        st.tuples(*[st.binary(min_size=32, max_size=64)] * count),
    )
)
VALUES: dict[type[ext.Extension], st.SearchStrategy[ext.Extension]] = {
    ext.ServerName: st.builds(ext.ServerName, names),
    ext.ServerNameAck: st.just(ext.ServerNameAck()),
    ext.SupportedGroups: st.builds(ext.SupportedGroups, codes),
    ext.SignatureAlgorithms: st.builds(ext.SignatureAlgorithms, codes),
    ext.SignatureAlgorithmsCert: st.builds(ext.SignatureAlgorithmsCert, codes),
    ext.AlpnOffer: st.builds(ext.AlpnOffer, st.lists(blobs, min_size=1, max_size=3).map(tuple)),
    ext.AlpnChoice: st.builds(ext.AlpnChoice, blobs),
    ext.ClientCertificateTypeOffer: st.builds(ext.ClientCertificateTypeOffer, certificate_types),
    ext.ClientCertificateTypeChoice: st.builds(ext.ClientCertificateTypeChoice, u8s),
    ext.ServerCertificateTypeOffer: st.builds(ext.ServerCertificateTypeOffer, certificate_types),
    ext.ServerCertificateTypeChoice: st.builds(ext.ServerCertificateTypeChoice, u8s),
    ext.Padding: st.builds(ext.Padding, st.integers(0, 300)),
    ext.RecordSizeLimit: st.builds(ext.RecordSizeLimit, st.integers(64, 0xFFFF)),
    ext.TlsCertWithExternPsk: st.just(ext.TlsCertWithExternPsk()),
    ext.PreSharedKeyOffer: offers,
    ext.PreSharedKeyChoice: st.builds(ext.PreSharedKeyChoice, u16s),
    ext.EarlyDataIndication: st.just(ext.EarlyDataIndication()),
    ext.EarlyDataLimit: st.builds(ext.EarlyDataLimit, u32s),
    ext.SupportedVersionsOffer: st.builds(ext.SupportedVersionsOffer, codes),
    ext.SupportedVersionsChoice: st.builds(ext.SupportedVersionsChoice, u16s),
    ext.Cookie: st.builds(ext.Cookie, blobs),
    ext.PskKeyExchangeModes: st.builds(ext.PskKeyExchangeModes, types8),
    ext.CertificateAuthorities: st.builds(
        ext.CertificateAuthorities, st.lists(blobs, min_size=1, max_size=3).map(tuple)
    ),
    ext.OidFilters: st.builds(
        ext.OidFilters, st.lists(st.tuples(blobs, st.binary(max_size=9)), max_size=3).map(tuple)
    ),
    ext.PostHandshakeAuth: st.just(ext.PostHandshakeAuth()),
    ext.KeyShareOffer: st.builds(ext.KeyShareOffer, st.lists(entries, max_size=3).map(tuple)),
    ext.KeyShareChoice: st.builds(ext.KeyShareChoice, entries),
    ext.KeyShareRetry: st.builds(ext.KeyShareRetry, u16s),
    ext.TlsFlags: st.builds(ext.TlsFlags, st.frozensets(st.integers(0, 2039), min_size=1)),
    ext.FreshQkdKeysOffer: st.builds(ext.FreshQkdKeysOffer, types8),
    ext.FreshQkdKeysAnswer: st.builds(ext.FreshQkdKeysAnswer, u8s),
    ext.OneTimePadOffer: st.builds(
        ext.OneTimePadOffer, st.lists(u16s, min_size=1, max_size=127).map(tuple)
    ),
    ext.OneTimePadAnswer: st.builds(ext.OneTimePadAnswer, u16s),
}
